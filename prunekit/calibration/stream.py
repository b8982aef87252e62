"""The decoder layers one by one, no pass twice.

What is kept between two layers are the hidden states of all batches. In a layer, a module whose
output is its consumer's output (an attention block, an FFN) need not run again once its consumer is
repaired: from then on it answers with the consumer's output on the inputs that were put aside. So a
layer takes one forward pass, in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.blocks import Block, Finder, constant, outputs_aside, replaced
from prunekit.calibration.consumers import Consumer, See, watched
from prunekit.calibration.layers import Layers
from prunekit.calibration.observe import HELD_OUT, Observation, Site, Stop
from prunekit.calibration.store import Kept, Store
from prunekit.data.batches import Batch, Numbered, copy_batch, count_positions
from prunekit.errors import DataError
from prunekit.graph import Group
from prunekit.model.stack import stacks_around
from prunekit.runtime.console import say
from prunekit.runtime.numbers import wide
from prunekit.runtime.processes import add_up, together

Found = tuple[Group, list[Site]]


@dataclass
class _Call:
    """One layer's call on one batch, the hidden states left out (`key`: their name where they are
    no positional).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None


@dataclass
class Stream:
    """The layers, what they are called with, and the hidden states before the layer in turn."""

    layers: nn.ModuleList
    groups: Sequence[Group]
    consumers: Mapping[str, list[Consumer]]
    batches: Sequence[Numbered]
    store: Store
    source: Layers | None
    hidden: list[Kept] = field(default_factory=list)
    dense: list[Kept] = field(default_factory=list)
    calls: list[list[_Call]] = field(default_factory=list)  # [batch][layer]
    said: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls,
        model: nn.Module,
        groups: Sequence[Group],
        consumers: Mapping[str, list[Consumer]],
        batches: Sequence[Numbered],
        store: Store,
        source: Layers | None = None,
    ) -> Stream | None:
        """Record what the layers are called with; None where they don't feed one another in order."""
        paths = stacks_around(model, [group.module for group in groups])
        path = next(iter(paths), None)
        if path is None or len(paths) > 1:
            return None
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        inside = [set(layer.modules()) for layer in layers]
        for consumer in (c for found in consumers.values() for c in found):
            if sum(consumer.module in modules for modules in inside) > 1:
                return None
        stream = cls(layers, groups, consumers, batches, store, source)
        with source.outside() if source else nullcontext():
            chained = any(
                stream._record_all(model, wrap)
                for wrap in (lambda hidden: hidden, lambda hidden: (hidden,))
            )
        if stream._everywhere(chained):
            return stream
        stream._forget()
        return None

    def _forget(self) -> None:
        for kept in self.hidden:
            kept.free()
        self.hidden, self.calls = [], []

    def _record_all(self, model: nn.Module, wrap: Callable[[Tensor], Any]) -> bool:
        """Record all batches; False where a layer needs more of those before it than their hidden
        states.
        """
        self._forget()
        for _, batch in self.batches:
            found = self._record(model, batch, wrap, lambda hidden: hidden)
            if found is None:
                return False
            self.hidden.append(self.store.put(found[0]))
            self.calls.append(
                [_Call(c.args, self._shared(i, c.kwargs), c.key) for i, c in enumerate(found[1])]
            )
        again = self._record(model, self.batches[0][1], wrap, lambda hidden: 2 * hidden + 1)
        return again is not None and _same(
            [(c.args, c.kwargs) for c in self.calls[0]], [(c.args, c.kwargs) for c in again[1]]
        )

    @torch.no_grad()
    def _record(
        self,
        model: nn.Module,
        batch: Batch,
        wrap: Callable[[Tensor], Any],
        change: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, list[_Call]] | None:
        """What layers that only `change` what they are given are called with, and what the first
        one is given.
        """
        calls: list[_Call] = []
        states: list[Tensor] = []

        def stub(layer: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                key = None if args else "hidden_states"
                hidden = args[0] if key is None else kwargs.pop(key)
                leaves = torch.utils._pytree.tree_leaves((args[1:], kwargs))
                chained = hidden is states[-1] if states else isinstance(hidden, Tensor)
                if layer != len(calls) or not chained or any(leaf is hidden for leaf in leaves):
                    raise Stop
                states.append(hidden.clone() if not states else hidden)
                calls.append(_Call(args[1:], kwargs, key))
                if len(calls) == len(self.layers):
                    raise Stop
                states.append(change(hidden))
                return wrap(states[-1])

            return forward

        with ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                stack.enter_context(replaced(layer, stub(i)))
            try:
                model(**copy_batch(batch))
            except Stop:
                pass
            except Exception:  # a layer's output is more than hidden states
                return None
        return (states[0], calls) if len(calls) == len(self.layers) else None

    def _shared(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments, tensors that equal those of the last batch taken from there: rotations,
        masks.
        """
        before = self.calls[-1][layer].kwargs if self.calls else {}

        def same(value: Any, last: Any) -> Any:
            if isinstance(value, tuple) and isinstance(last, tuple) and len(value) == len(last):
                return tuple(same(v, w) for v, w in zip(value, last, strict=True))
            equal = (
                isinstance(value, Tensor) and isinstance(last, Tensor) and value.shape == last.shape
            )
            return last if equal and (value is last or torch.equal(value, last)) else value

        return {name: same(value, before.get(name)) for name, value in kwargs.items()}

    def walk(self, targets: Mapping[str, str], done: Container[str]) -> Iterator[Found]:
        """Yield (group, sites) layer by layer; see `Walk`."""
        last = max(group.layer for group in self.groups if group.layer is not None)
        if targets and _rows(self.batches, self.store.device) < HELD_OUT:
            say(
                f"fewer than {HELD_OUT} calibration samples: too few to hold some out; target=pruned is taken"
            )
            targets = {}
        if targets:
            self.dense = [self.store.put(kept.get()) for kept in self.hidden]
        for i in range(last + 1):
            if self.source:
                self.source.enter(i)
            yield from self._layer(i, i == last, targets, done)

    def _layer(
        self, i: int, last: bool, targets: Mapping[str, str], done: Container[str]
    ) -> Iterator[Found]:
        here = [group for group in self.groups if group.layer == i]
        single = [found[0] for group in here if len(found := self.consumers[group.name]) == 1]
        single = [
            c for c in single if c.expert is None and sum(c.module is o.module for o in single) == 1
        ]
        finder = Finder(self.layers[i], single, shallow=bool(targets))
        after = self._dense_pass(i, finder) if targets else []
        for group in here:
            with together():
                site = self._observe(
                    i, group, finder, targets.get(group.name, "pruned"), group.name in done
                )
            yield group, [] if site is None else site.finish()
        first = self.hidden[0].get(copy=True) if self.source else None
        if not last:
            with together():
                self._advance(i, finder)
        if self.source:
            self.source.leave(i, lambda: self._run(i, 0, {}, first))
        for kept in self.dense:
            kept.free()
        self.dense = after
        for block in finder.blocks:
            block.free()

    def _dense_pass(self, i: int, finder: Finder) -> list[Kept]:
        """The layer as it is on the dense states: its blocks' outputs are put aside, its output
        comes back.
        """
        after = []
        for b in range(len(self.batches)):
            with finder.looking() if b == 0 else outputs_aside(finder.blocks, self.store, b):
                after.append(self.store.put(self._run(i, b, {}, self.dense[b]), copy=False))
        for block in finder.blocks:
            block.dense[0] = self.store.put(block.first, copy=False)
        return after

    def _observe(
        self, i: int, group: Group, finder: Finder, target: str, done: bool
    ) -> Observation | None:
        """Feed the group's consumers, put their inputs aside where that saves running their module
        again.
        """
        consumers = self.consumers[group.name]
        block = finder.block_of(consumers)
        if target != "pruned" and not self._everywhere(block is not None):
            self._say_once(
                "no lone consumer whose output can be told: target=pruned is taken", group
            )
            target = "pruned"
        elif block and target == "residual" and not self._is_added(i, finder, block):
            self._say_once(
                "its output is not simply added to the residual stream: target=dense is taken",
                group,
            )
            target = "dense"
        observation = Observation(consumers, target != "pruned")
        for b, (sample, batch) in enumerate(self.batches):
            look = block is None and b == 0 and finder.unsettled(consumers)
            if done and block is None and not look:
                break  # nothing to be gained
            wanted = (
                self._target(i, b, finder, block, target)
                if block and target != "pruned" and not done
                else None
            )
            aside = block.inputs if block else {}
            keep = partial(self._keep, aside, b) if look or block else None
            see = _feeder(consumers, None if done else observation.see, keep, stop=not look)
            watching = finder.looking(consumers[0]) if look else nullcontext()
            with observation.of(sample, batch, wanted), watched(consumers, see), watching:
                self._run(i, b, finder.answers(b, self.store))
            if look and (block := finder.block_of(consumers)):
                block.inputs.update(aside)
            elif look:
                for kept in aside.values():
                    kept.free()
        return None if done else observation

    def _say_once(self, reason: str, group: Group) -> None:
        if reason not in self.said:
            self.said.add(reason)
            say(f"{group.name}, and others like it: {reason}")

    def _keep(self, aside: dict[int, Kept], batch: int, inputs: Tensor) -> None:
        aside[batch] = self.store.put(inputs)

    def _advance(self, i: int, finder: Finder) -> None:
        """The hidden states behind the layer."""
        for b, (sample, _) in enumerate(self.batches):
            hidden = self._run(i, b, finder.answers(b, self.store))
            if not torch.isfinite(hidden).all():
                bad = (~torch.isfinite(hidden.flatten(1))).any(1).nonzero()[0].item()
                raise DataError(
                    f"layer {i}: its outputs hold NaN or infinity in calibration sample {sample + bad}"
                )
            self.hidden[b].free()
            self.hidden[b] = self.store.put(hidden, copy=False)

    def _target(self, i: int, b: int, finder: Finder, block: Block, target: str) -> Tensor:
        """What the block's consumer must give: the dense output, or what brings back the dense
        residual stream.
        """
        if target == "dense":
            return block.dense[b].get()
        earlier, later = finder.around(block)
        zero = {o: torch.zeros_like(o.dense[b].get()) for o in later}
        dense = {o: o.dense[b].get() for o in (*earlier, block)}
        pruned = {o: o.output(b, self.store) for o in earlier}
        stream = self._run(i, b, {**zero, **dense}, self.dense[b])
        return wide(stream) - wide(
            self._run(i, b, {**zero, **pruned, block: torch.zeros_like(dense[block])})
        )

    def _is_added(self, i: int, finder: Finder, block: Block) -> bool:
        """Whether the layer's output, but for the blocks behind this one, is a sum with this
        block's output.
        """
        earlier, later = finder.around(block)
        own = block.dense[0].get()
        rest = {o: o.dense[0].get() for o in earlier} | {
            o: torch.zeros_like(o.dense[0].get()) for o in later
        }
        given = self._run(i, 0, {**rest, block: own}, self.dense[0])
        without = self._run(i, 0, {**rest, block: torch.zeros_like(own)}, self.dense[0])
        differs = own.numel() != given.numel() or not _is_sum(
            wide(given), wide(without), wide(own.view_as(given))
        )
        return self._everywhere(not differs)

    def _everywhere(self, holds: bool) -> bool:
        """Whether something holds in all processes: they must go the same way."""
        return add_up(torch.tensor([float(not holds)], device=self.store.device)).item() == 0

    @torch.no_grad()
    def _run(
        self, i: int, b: int, answers: Mapping[Block, Tensor], hidden: Kept | Tensor | None = None
    ) -> Tensor:
        """The layer's output on a batch, with the answers of blocks that need not run; empty where
        it was stopped.
        """
        call = self.calls[b][i]
        hidden = self.hidden[b] if hidden is None else hidden
        states = hidden.get(copy=True) if isinstance(hidden, Kept) else hidden.clone()
        args = call.args if call.key else (states, *call.args)
        kwargs = {**call.kwargs, call.key: states} if call.key else call.kwargs
        with ExitStack() as stack:
            for block, output in answers.items():
                stack.enter_context(replaced(block.module, constant(block.answer(output.clone()))))
            try:
                return _first(self.layers[i](*args, **kwargs))
            except Stop:
                return states.new_empty(0)


def _feeder(
    consumers: Sequence[Consumer],
    take: See | None,
    keep: Callable[[Tensor], None] | None,
    stop: bool,
) -> See:
    """What to do with what the consumers are fed; with `stop` the pass ends when all have been."""
    missing = set(consumers)

    def see(consumer: Consumer, inputs: Tensor) -> None:
        if take:
            take(consumer, inputs)
        if keep:
            keep(inputs)
        missing.discard(consumer)
        if stop and not missing:
            raise Stop

    return see


def _is_sum(total: Tensor, rest: Tensor, part: Tensor) -> bool:
    """Whether total = rest + part, but for rounding; told where the rest is small, and with it the
    rounding.
    """
    small = rest.abs() <= rest.abs().median()
    lost = (total - rest - part)[small].square().sum()
    return bool(lost <= 0.01 * part[small].square().sum())


def _same(left: Any, right: Any) -> bool:
    """Whether two structures hold equal tensors."""
    pairs = zip(*(torch.utils._pytree.tree_leaves(found) for found in (left, right)), strict=False)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in tensors)


def _rows(batches: Sequence[Numbered], device: torch.device) -> int:
    rows = sum(count_positions(batch)[0] for _, batch in batches)
    return int(add_up(torch.tensor([rows], device=device)))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
