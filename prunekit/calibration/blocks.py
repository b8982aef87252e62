"""Modules inside a layer whose output is their consumer's: they need not run again once its inputs
are put aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.consumers import Consumer
from prunekit.calibration.observe import Stop
from prunekit.calibration.store import Kept, Store

_tree = torch.utils._pytree


@dataclass(eq=False)
class Block:
    """A module whose output, in a structure of `leaves`, is its consumer's.

    `first`: the consumer's output on the batch the block was found with. By batch: the consumer's
    `inputs` until it is repaired, then its `outputs`; its `dense` outputs where a target needs
    them.
    """

    module: nn.Module
    consumer: Consumer
    leaves: list[Any]
    spec: Any
    place: int
    first: Tensor
    inputs: dict[int, Kept] = field(default_factory=dict)
    outputs: dict[int, Kept] = field(default_factory=dict)
    dense: dict[int, Kept] = field(default_factory=dict)

    def answer(self, output: Tensor) -> Any:
        """What the module returns where the consumer gives `output`."""
        leaves = [*self.leaves[: self.place], output, *self.leaves[self.place + 1 :]]
        return _tree.tree_unflatten(leaves, self.spec)

    @torch.no_grad()
    def output(self, batch: int, store: Store) -> Tensor:
        """What the consumer makes of the inputs put aside."""
        if batch not in self.outputs:
            self.outputs[batch] = store.put(
                self.consumer.module(self.inputs[batch].get()), copy=False
            )
            self.inputs.pop(batch).free()
        return self.outputs[batch].get()

    def free(self) -> None:
        """Let go of all that was put aside."""
        for kept in (self.inputs, self.outputs, self.dense):
            for tensor in kept.values():
                tensor.free()
            kept.clear()


class Finder:
    """Finds each consumer's block while a layer runs: the outermost module inside it that has the
    same output.

    A block that is the consumer alone saves nothing; it counts only with `shallow`, for targets.
    """

    def __init__(self, layer: nn.Module, consumers: Sequence[Consumer], shallow: bool) -> None:
        self.layer, self.consumers, self.shallow = layer, list(consumers), shallow
        self.found: dict[Consumer, Block | None] = {}

    @property
    def blocks(self) -> list[Block]:
        """What was found, in the consumers' order."""
        return [block for consumer in self.consumers if (block := self.found.get(consumer))]

    def unsettled(self, consumers: Sequence[Consumer]) -> bool:
        """Whether a group's lone consumer may have a block that wasn't looked for yet."""
        return (
            len(consumers) == 1
            and consumers[0] in self.consumers
            and consumers[0] not in self.found
        )

    def block_of(self, consumers: Sequence[Consumer]) -> Block | None:
        """The block of a group's lone consumer."""
        return self.found.get(consumers[0]) if len(consumers) == 1 else None

    def around(self, block: Block) -> tuple[list[Block], list[Block]]:
        """The blocks before it and behind it."""
        place = self.blocks.index(block)
        return self.blocks[:place], self.blocks[place + 1 :]

    def answers(self, batch: int, store: Store) -> dict[Block, Tensor]:
        """The outputs of the blocks whose consumers are done with."""
        return {
            block: block.output(batch, store)
            for block in self.blocks
            if batch in block.inputs or batch in block.outputs
        }

    @contextmanager
    def looking(self, consumer: Consumer | None = None) -> Iterator[None]:
        """Watch one run of the layer; for one consumer alone it ends behind the outermost module
        around it.
        """
        alone, wanted = consumer is not None, [consumer] if consumer else self.consumers
        own: dict[Consumer, list[tuple[Tensor, Tensor]]] = {consumer: [] for consumer in wanted}
        outer: dict[Consumer, list[tuple[nn.Module, Any]]] = {consumer: [] for consumer in wanted}
        with ExitStack() as stack:
            for consumer in wanted:
                around = self._around(consumer.module)
                for module in around:
                    hook = _note(consumer, module, own, outer, stop=alone and module is around[-1])
                    stack.callback(module.register_forward_hook(hook).remove)
            yield
        for consumer in wanted:
            block = _block(consumer, own[consumer], outer[consumer])
            useful = block and (self.shallow or block.module is not consumer.module)
            self.found[consumer] = block if useful else None

    def _around(self, module: nn.Module) -> list[nn.Module]:
        """The module and those around it, inside the layer; the innermost first."""
        path = next(path for path, found in self.layer.named_modules() if found is module)
        parts = path.split(".")
        return [self.layer.get_submodule(".".join(parts[:k])) for k in range(len(parts), 0, -1)]


def _note(
    consumer: Consumer, module: nn.Module, own: dict, outer: dict, stop: bool
) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        if module is consumer.module:
            own[consumer].append((output, output.clone()))  # the layer may write to it later
        outer[consumer].append((module, output))
        if stop:
            raise Stop

    return hook


def _block(
    consumer: Consumer, own: list[tuple[Tensor, Tensor]], outer: list[tuple[nn.Module, Any]]
) -> Block | None:
    if len(own) != 1:
        return None
    output, first = own[0]
    found = None
    for module, given in outer:  # the innermost finish first
        leaves, spec = _tree.tree_flatten(given)
        tensors = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(tensors) == 1 and torch.equal(leaves[tensors[0]], output):
            rest = [None if k in tensors else leaf for k, leaf in enumerate(leaves)]
            found = Block(module, consumer, rest, spec, tensors[0], first)
    return found


@contextmanager
def outputs_aside(blocks: Sequence[Block], store: Store, batch: int) -> Iterator[None]:
    """Put the blocks' dense outputs aside."""
    with ExitStack() as stack:
        for block in blocks:

            def hook(_: nn.Module, args: Any, output: Tensor, block: Block = block) -> None:
                block.dense[batch] = store.put(output)

            stack.callback(block.consumer.module.register_forward_hook(hook).remove)
        yield


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for the duration of a `with` block."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own  # type: ignore[method-assign]


def constant(value: Any) -> Callable[..., Any]:
    """A forward that always gives `value`."""
    return lambda *args, **kwargs: value
