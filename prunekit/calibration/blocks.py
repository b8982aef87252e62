"""Blocks: modules inside a layer that return the output of their consumer.

An attention block returns the output of its output projection, an FFN the output of its down
projection. Such a module need not run again once the inputs of its consumer are put aside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.consumers import Consumer, watching
from prunekit.calibration.hooks import Stop
from prunekit.calibration.store import Kept, Store

_tree = torch.utils._pytree


@dataclass(eq=False)
class Block:
    """A module that returns the output of its consumer, alone or in a structure of values.

    `leaves`, `spec`: the flattened structure, with the consumer's output at `place` left out.
    `first`: the consumer's output on the batch that the block was found with, until it is taken or
    turns out to be of no use. `added`: whether its output is simply added to the residual stream,
    None until somebody asks. `ends_sum`: the stream behind the block is known to be the layer's
    input plus the outputs of its blocks up to this one. `folded`: the outputs are in the hidden
    states before the layer by now (`LayerPass.fold`), and the block gives zero. By batch: `inputs`
    of the consumer until it is repaired, its `outputs` from then on, and its `dense` outputs where
    a target needs them.
    """

    module: nn.Module
    consumer: Consumer
    leaves: list[Any]
    spec: Any
    place: int
    first: Tensor | None
    added: bool | None = None
    ends_sum: bool = False
    folded: bool = False
    inputs: dict[int, Kept] = field(default_factory=dict)
    outputs: dict[int, Kept] = field(default_factory=dict)
    dense: dict[int, Kept] = field(default_factory=dict)

    def answer(self, output: Tensor) -> Any:
        """The value that the module returns where its consumer gives `output`."""
        leaves = [*self.leaves[: self.place], output, *self.leaves[self.place + 1 :]]
        return _tree.tree_unflatten(leaves, self.spec)

    @torch.no_grad()
    def output(self, batch: int, store: Store, *, last: bool = False) -> Tensor:
        """The output of the repaired consumer on the inputs put aside, computed once a batch.

        `last`: nobody will ask for it again, so that nothing is kept.
        """
        by_batch = self.outputs if batch in self.outputs else self.inputs
        if following := by_batch.get(batch + 1):
            following.fetch()
        output = by_batch[batch].get()
        if by_batch is self.inputs or last:
            by_batch.pop(batch).free()
        if by_batch is self.inputs:
            hooked = self.consumer.is_hooked
            output = self.consumer.module(output) if hooked else self.consumer.multiply(output)
            if not last:
                self.outputs[batch] = store.put(output, copy=False)
        return output

    def take_first(self) -> Tensor:
        """Hand over the output on the first batch: the block does not keep it."""
        first, self.first = self.first, None
        assert first is not None
        return first

    def free(self) -> None:
        """Let go of all tensors that are put aside."""
        for by_batch in (self.inputs, self.outputs, self.dense):
            for kept in by_batch.values():
                kept.free()
            by_batch.clear()


class Finder:
    """Finds the block of each consumer while a layer runs.

    Of the modules around a consumer that return its output, the outermost inside the layer is the
    block. The consumer alone saves nothing as a block; it counts only where `shallow` asks for it,
    because targets need to know its output.
    """

    def __init__(self, layer: nn.Module, consumers: Sequence[Consumer], shallow: bool) -> None:
        self.layer, self.consumers, self.shallow = layer, list(consumers), shallow
        self._blocks: dict[Consumer, Block | None] = {}  # None: looked for, and there is none

    @property
    def blocks(self) -> list[Block]:
        """The blocks known so far, in the order of their consumers."""
        return [block for consumer in self.consumers if (block := self._blocks.get(consumer))]

    def must_look_for(self, consumers: Sequence[Consumer]) -> bool:
        """Whether these are a lone consumer whose block has not been looked for yet."""
        lone = consumers[0] if len(consumers) == 1 else None
        return lone in self.consumers and lone not in self._blocks

    def block_of(self, consumers: Sequence[Consumer]) -> Block | None:
        """The block of a group's lone consumer; None where it has none, or none is known."""
        return self._blocks.get(consumers[0]) if len(consumers) == 1 else None

    def around(self, block: Block) -> tuple[list[Block], list[Block]]:
        """The blocks before this one and those behind it."""
        place = self.blocks.index(block)
        return self.blocks[:place], self.blocks[place + 1 :]

    def answers(self, batch: int, store: Store, *, last: bool = False) -> dict[Block, Tensor]:
        """The outputs that are known of the blocks whose consumers are finished.

        `last`: as for `Block.output`.
        """
        return {
            block: block.output(batch, store, last=last)
            for block in self.blocks
            if batch in block.inputs or batch in block.outputs
        }

    @contextmanager
    def looking(self, consumer: Consumer | None = None, *, stops: bool = False) -> Iterator[None]:
        """Watch one run of the layer; find the blocks of all consumers, or of one, at its end.

        `stops`: the run ends behind the outermost module around the one `consumer`.
        """
        consumers = self.consumers if consumer is None else [consumer]
        sightings = {one: Sighting(one) for one in consumers}
        with ExitStack() as stack:
            for one, sighting in sightings.items():
                around = self._around(one.module)
                for module in around:
                    note = partial(sighting.note, stop=stops and module is around[-1])
                    stack.callback(module.register_forward_hook(note).remove)
            others = [one for one in consumers if not one.is_hooked]
            see = partial(_note_inputs, sightings)
            stack.enter_context(watching(others, see))
            yield
        for one, sighting in sightings.items():
            block = sighting.find_block()
            useful = block and (self.shallow or block.module is not one.module)
            if block and not self.shallow:
                block.first = None  # only targets need it
            self._blocks[one] = block if useful else None

    def path_of(self, module: nn.Module) -> str:
        """The path of a module inside the layer; empty for others."""
        found = (path for path, other in self.layer.named_modules() if other is module)
        return next(found, "")

    def _around(self, module: nn.Module) -> list[nn.Module]:
        """The module and those around it inside the layer, the innermost first."""
        parts = self.path_of(module).split(".")
        return [self.layer.get_submodule(".".join(parts[:k])) for k in range(len(parts), 0, -1)]


class Sighting:
    """The outputs of a consumer, and of the modules around it, in one run of a layer."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        # The output itself, to compare with, and a copy: the layer may write to its output later.
        self.own: list[tuple[Tensor, int, Tensor]] = []
        self.inputs: Tensor | None = None  # of a product that a module of one's own computes
        self.around: list[tuple[nn.Module, Any]] = []  # the innermost module returns first

    def note(self, module: nn.Module, args: Any, output: Any, *, stop: bool) -> None:
        """Forward hook of the consumer's module and of those around it.

        Raises:
            Stop: `stop` says that nothing behind this module is of interest.
        """
        if module is self.consumer.module and isinstance(output, Tensor):
            own = self.inputs is None or self.consumer.gives(self.inputs, output)
            self.own += [(output, output._version, output.clone())] if own else []
        self.around.append((module, output))
        if stop:
            raise Stop

    def find_block(self) -> Block | None:
        """The outermost module that returned the consumer's output and no other tensor.

        None where the consumer ran more than once, or not at all, or its module returns more.
        """
        if len(self.own) != 1:
            return None
        output, version, first = self.own[0]
        block = None
        for module, returned in self.around:
            leaves, spec = _tree.tree_flatten(returned)
            places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            if len(places) != 1:
                continue
            leaf = leaves[places[0]]
            # Equal values would not do: what a module masks, say, it need not mask in this batch.
            if leaf._version == version and _is_same(leaf, output):
                rest = [None if k in places else leaf for k, leaf in enumerate(leaves)]
                block = Block(module, self.consumer, rest, spec, places[0], first)
        return block


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is another one, or a view of it that differs in nothing."""
    same = one.data_ptr() == other.data_ptr() and one.shape == other.shape
    return same and one.stride() == other.stride()


def _note_inputs(
    sightings: Mapping[Consumer, Sighting], consumer: Consumer, inputs: Tensor
) -> None:
    """See the inputs of a consumer's product, once the sightings are bound."""
    sightings[consumer].inputs = inputs


@contextmanager
def keeping_dense_outputs(blocks: Sequence[Block], store: Store, batch: int) -> Iterator[None]:
    """Put the outputs of the blocks' consumers on a batch aside, as their dense outputs."""
    with ExitStack() as stack:
        for block in blocks:
            note = partial(_put_dense_aside, block, store, batch)
            stack.callback(block.consumer.module.register_forward_hook(note).remove)
        yield


def _put_dense_aside(
    block: Block, store: Store, batch: int, module: nn.Module, args: Any, output: Tensor
) -> None:
    """Forward hook of a consumer's module, once the first three arguments are bound."""
    block.dense[batch] = store.put(output)
