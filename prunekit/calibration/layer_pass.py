"""A pass through one layer: its states and calls on each batch, and the blocks inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.calibration.blocks import Block, Finder, keeping_dense_outputs
from prunekit.calibration.calls import LayerCall, arguments, copy_containers
from prunekit.calibration.hooks import Stop, replacing, return_always
from prunekit.calibration.store import Kept, Store
from prunekit.data.batches import Numbered
from prunekit.errors import DataError
from prunekit.model.stack import hidden_of_output
from prunekit.runtime.processes import hold_everywhere


@dataclass(kw_only=True)
class LayerPass:
    """A layer, its calls, the hidden states before it, and its blocks.

    `calls`, `hidden` and `dense` have an entry for each batch. `hidden`: the states that the pruned
    layers before this one give; `dense`: those of the dense model, where a target needs them, which
    go with `dense_calls`. `written`: as that of the `Recording`.
    `advance` replaces the hidden states by those behind the layer.
    """

    index: int
    layer: nn.Module
    calls: Sequence[LayerCall]
    dense_calls: Sequence[LayerCall]
    written: bool
    batches: Sequence[Numbered]
    hidden: list[Kept]
    dense: list[Kept]
    finder: Finder
    store: Store

    @property
    def trials(self) -> list[int]:
        """Batches to try things on: the first, and one whose call has other arguments, if any."""
        first, *others = (
            [leaf for leaf in arguments([call]) if isinstance(leaf, Tensor)] for call in self.calls
        )
        return [0, *(b for b, own in enumerate(others, 1) if not _are(own, first))][:2]

    @torch.no_grad()
    def run(
        self,
        batch: int,
        answers: Mapping[Block, Tensor],
        *,
        dense: bool = False,
        states: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """Run the layer on a batch: its output [B, T, size], empty where `Stop` ended the pass.

        Args:
            batch: the place of the batch.
            answers: outputs of the consumers of blocks that need not run.
            dense: start from the states of the dense layers, not from those of the pruned ones.
            states: start from these states, which the layer may write to.
            last: keep what the layer writes to dicts and lists, for those behind it.
        """
        before = self.dense if dense else self.hidden
        if states is None:
            # A copy, because some layers write to the hidden states that they are given.
            states = before[batch].get(copy=True)
            if batch + 1 < len(before):
                before[batch + 1].fetch()
        folded = (block for block in self.finder.blocks if block.folded)
        answers = {**answers, **{block: torch.zeros_like(states) for block in folded}}
        with ExitStack() as stack:
            for block, output in answers.items():
                answer = partial(return_always, block.answer(output.clone()))
                stack.enter_context(replacing(block.module, answer))
            try:
                call = (self.dense_calls if dense else self.calls)[batch]
                if self.written and not last:
                    (call,) = copy_containers([call])
                after = hidden_of_output(call.make(self.layer, states))
            except Stop:
                return states.new_empty(0)
        assert after is not None
        return after

    def run_pruned(self, batch: int, *, last: bool = False) -> Tensor:
        """Run the layer as it is by now; blocks whose outputs are known need not run.

        `last`: the batch is not run through this layer any more.
        """
        return self.run(batch, self.finder.answers(batch, self.store, last=last), last=last)

    @torch.no_grad()
    def fold(self, block: Block | None) -> None:
        """Add the outputs of a finished block to the hidden states, where not all inputs are kept.

        Otherwise the block would have to run in every pass of the layer from now on. Nothing is
        done where the layer makes another use of them: its output must stay the same bit for bit,
        on the batches that it is tried on.
        """
        whole = range(len(self.batches))
        known = block is None or all(b in block.inputs or b in block.outputs for b in whole)
        if not hold_everywhere(not known, self.store.device):
            return
        assert block is not None
        same = all(self._can_fold(batch, block) for batch in self.trials)
        if hold_everywhere(same, self.store.device):
            for batch in whole:
                states = self.hidden[batch].get() + self._output_of(batch, block)
                self.hidden[batch].free()
                self.hidden[batch] = self.store.put(states, copy=False)
            block.folded = True
            for kept in (block.inputs, block.outputs):
                for one in kept.values():
                    one.free()
                kept.clear()

    def _can_fold(self, batch: int, block: Block) -> bool:
        """Whether a batch's output is the same if a block's outputs are added before the layer."""
        output, states = self._output_of(batch, block), self.hidden[batch].get()
        if output.shape != states.shape or output.dtype != states.dtype:
            return False
        plain = self.run(batch, {block: output})
        zero = torch.zeros_like(output)
        return torch.equal(plain, self.run(batch, {block: zero}, states=states + output))

    def _output_of(self, batch: int, block: Block) -> Tensor:
        """The output of a block's finished consumer, from its inputs or a pass as far as that."""
        if batch in block.inputs or batch in block.outputs:
            return block.output(batch, self.store)
        found: list[Tensor] = []

        def note(module: nn.Module, args: object, output: Tensor) -> None:
            found.append(output)
            raise Stop

        handle = block.consumer.module.register_forward_hook(note)
        try:
            self.run_pruned(batch)
        finally:
            handle.remove()
        return found[0]

    def run_dense(self) -> list[Kept]:
        """Run the layer on the dense states, before it changes; its outputs by batch.

        The outputs of its blocks are put aside on the way: targets need them.
        """
        after = []
        for batch in range(len(self.batches)):
            aside = keeping_dense_outputs(self.finder.blocks, self.store, batch)
            with self.finder.looking() if batch == 0 else aside:
                output = self.run(batch, {}, dense=True, last=True)
                after.append(self.store.put(output, copy=False))
        for block in self.finder.blocks:
            block.dense[0] = self.store.put(block.take_first(), copy=False)
        return after

    def _sum_up(self, batch: int) -> Tensor:
        """The states behind a layer that only adds the outputs of its blocks to them."""
        states = self.hidden[batch].get()
        for block in self.finder.blocks:
            output = block.output(batch, self.store, last=True)
            states = states + output.reshape(states.shape)
        return states

    def advance(self) -> None:
        """Replace the hidden states of all batches by those behind the layer.

        Raises:
            DataError: an output holds NaN or infinity.
        """
        finite, blocks = [], self.finder.blocks
        is_sum = bool(blocks) and blocks[-1].ends_sum and not self.written
        for batch in range(len(self.batches)):
            output = self._sum_up(batch) if is_sum else self.run_pruned(batch, last=True)
            finite.append(torch.isfinite(output.flatten(1)).all(1))
            self.hidden[batch].free()
            self.hidden[batch] = self.store.put(output, copy=False)
        if not torch.cat(finite).all():  # the device is waited for once a layer
            samples = [
                sample + row
                for (sample, _), rows in zip(self.batches, finite, strict=True)
                for row, sound in enumerate(rows.tolist())
                if not sound
            ]
            raise DataError(
                f"layer {self.index}: its outputs hold NaN or infinity in calibration sample "
                f"{samples[0]}"
            )


def _are(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors are the same ones, and not only equal."""
    return len(ones) == len(others) and all(a is b for a, b in zip(ones, others, strict=True))
