"""A pass through one layer: its states and calls on each batch, and the blocks inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.calibration.blocks import Block, Finder, keeping_dense_outputs
from prunekit.calibration.calls import LayerCall
from prunekit.calibration.hooks import Stop, replacing, return_always
from prunekit.calibration.store import Kept, Store
from prunekit.data.batches import Numbered
from prunekit.errors import DataError
from prunekit.model.stack import hidden_of_output


@dataclass(kw_only=True)
class LayerPass:
    """A layer, its calls, the hidden states before it, and its blocks.

    `calls`, `hidden` and `dense` have an entry for each batch. `hidden`: the states that the pruned
    layers before this one give; `dense`: those of the dense model, where a target needs them.
    `advance` replaces the hidden states by those behind the layer.
    """

    index: int
    layer: nn.Module
    calls: Sequence[LayerCall]
    batches: Sequence[Numbered]
    hidden: list[Kept]
    dense: list[Kept]
    finder: Finder
    store: Store

    @torch.no_grad()
    def run(self, batch: int, answers: Mapping[Block, Tensor], *, dense: bool = False) -> Tensor:
        """Run the layer on a batch: its output [B, T, size], empty where `Stop` ended the pass.

        Args:
            batch: the place of the batch.
            answers: outputs of the consumers of blocks that need not run.
            dense: start from the states of the dense layers, not from those of the pruned ones.
        """
        before = self.dense if dense else self.hidden
        # A copy, because some layers write to the hidden states that they are given.
        states = before[batch].get(copy=True)
        if batch + 1 < len(before):
            before[batch + 1].fetch()
        with ExitStack() as stack:
            for block, output in answers.items():
                answer = partial(return_always, block.answer(output.clone()))
                stack.enter_context(replacing(block.module, answer))
            try:
                after = hidden_of_output(self.calls[batch].make(self.layer, states))
            except Stop:
                return states.new_empty(0)
        assert after is not None
        return after

    def run_pruned(self, batch: int) -> Tensor:
        """Run the layer as it is by now; the blocks whose consumers are finished need not run."""
        return self.run(batch, self.finder.answers(batch, self.store))

    def run_dense(self) -> list[Kept]:
        """Run the layer on the dense states, before it changes; its outputs by batch.

        The outputs of its blocks are put aside on the way: targets need them.
        """
        after = []
        for batch in range(len(self.batches)):
            aside = keeping_dense_outputs(self.finder.blocks, self.store, batch)
            with self.finder.looking() if batch == 0 else aside:
                output = self.run(batch, {}, dense=True)
                after.append(self.store.put(output, copy=False))
        for block in self.finder.blocks:
            block.dense[0] = self.store.put(block.take_first(), copy=False)
        return after

    def advance(self) -> None:
        """Replace the hidden states of all batches by those behind the layer.

        Raises:
            DataError: an output holds NaN or infinity.
        """
        finite = []
        for batch in range(len(self.batches)):
            output = self.run_pruned(batch)
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
