"""A walk that runs the layers one by one, so that each layer takes one forward pass only.

Between two layers only the hidden states of all batches are kept. Inside a layer, a module that
returns the output of its consumer (an attention block, an FFN) need not run again once the consumer
is repaired: the output of the consumer is computed from the inputs that were put aside, and the
module returns it. So the forward pass of a layer is run in pieces, each of them once.

"Stream" means this stream of hidden states. A model whose weights come from disk layer by layer is
`prunekit.checkpoint.streamed.Streamed`; a stream reads its layers through `source`.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from prunekit.calibration.blocks import Finder
from prunekit.calibration.calls import LayerCall, Recording, copy_containers, record_calls
from prunekit.calibration.consumers import Consumer, find_lone_consumer, watching
from prunekit.calibration.feeding import Feeding
from prunekit.calibration.layer_pass import LayerPass
from prunekit.calibration.layers import Layers
from prunekit.calibration.observe import HELD_OUT, Observation, Site, TokenWeights
from prunekit.calibration.store import Kept, Store
from prunekit.calibration.targets import compute_target, is_added
from prunekit.calibration.token_norms import Norms, block_norms, has_norms, stream_norms
from prunekit.calibration.weigher import OWN_NORM, Weigher
from prunekit.data.batches import Numbered, count_positions
from prunekit.graph import Group
from prunekit.model.stack import stacks_around
from prunekit.runtime.console import say
from prunekit.runtime.processes import add_up, hold_everywhere, together

Visit = tuple[Group, list[Site]]


@dataclass
class Stream:
    """The layers of a model, their groups and consumers, and what goes into the layers.

    `consumers`: group name → its consumers. `source`: where the weights of the layers come from;
    None where all are in memory. `weigher`: gives the tokens their weights. `normed`: whether the
    model has norms. `whole`: the names of groups that nothing is removed from, and that are not
    shown. `times`: the class of a layer, and the paths of consumers inside it → how often each of
    these is fed in a pass.
    """

    layers: nn.ModuleList
    groups: Sequence[Group]
    consumers: dict[str, list[Consumer]]
    batches: Sequence[Numbered]
    store: Store
    source: Layers | None
    recording: Recording
    weigher: Weigher = field(default_factory=Weigher)
    normed: bool = True
    whole: set[str] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    times: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: nn.Module,
        groups: Sequence[Group],
        consumers: Mapping[str, list[Consumer]],
        batches: Sequence[Numbered],
        store: Store,
        source: Layers | None = None,
        weigher: Weigher | None = None,
    ) -> Stream | None:
        """Record the calls of the layers; None where these can't be run one by one.

        They can where all groups lie in one list of layers, none has a consumer that is used again,
        and each layer takes only hidden states from the one before it, in every process.
        """
        paths = stacks_around(model, [group.module for group in groups])
        path = next(iter(paths), None)
        if path is None or len(paths) > 1:
            return None
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        with source.outside() if source else nullcontext():
            recording = record_calls(model, layers, batches, store)
        if hold_everywhere(recording is not None, store.device):
            assert recording is not None
            found = dict(consumers)
            stream = cls(layers, groups, found, batches, store, source, recording)
            return replace(stream, weigher=weigher or stream.weigher, normed=has_norms(model))
        if recording is not None:
            recording.free()
        return None

    def bring_along(
        self, model: nn.Module, around: Sequence[Group], targets: Collection[str]
    ) -> None:
        """Let groups that stay whole have blocks too, in the layers of groups that have targets.

        What such a block returns has to be known apart: it is no part of what a target asks for,
        nor of the stream that token weights come from.
        """
        layers = {group.layer for group in self.groups if group.name in targets}
        groups = {group.name: group for group in self.groups}
        taken = {consumer.module for own in self.consumers.values() for consumer in own}
        for group in around:
            if group.name in groups or group.layer is None or group.layer not in layers:
                continue
            lone = find_lone_consumer(model, group)
            inside = set(self.layers[group.layer].modules())
            if lone is not None and lone.module in inside - taken:
                taken.add(lone.module)
                groups[group.name], self.consumers[group.name] = group, [lone]
                self.whole.add(group.name)
        if self.whole:
            self.groups = [groups[group.name] for group in around if group.name in groups]

    def walk(self, targets: Mapping[str, str], done: Container[str]) -> Iterator[Visit]:
        """Yield (group, sites) layer by layer; see `Walk`."""
        cut = [group.layer for group in self.groups if group.layer is not None]
        first, last = min(cut), max(cut)
        if targets and _count_rows(self.batches, self.store.device) < HELD_OUT:
            say(
                f"fewer than {HELD_OUT} calibration samples: too few to hold some out; "
                "target=pruned is taken"
            )
            targets = {}
        hidden: list[Kept] = self.recording.hidden
        dense: list[Kept] = []
        dense_calls = self.recording.calls
        needs_dense = bool(targets) or self.weigher.needs_norms
        for i in range(last + 1):
            if self.source:
                self.source.enter(i)
            if needs_dense and i == first:
                dense = list(hidden)  # up to the first layer that is cut both streams are the same
                dense_calls = [copy_containers(calls) for calls in self.recording.calls]
            layer = self._open_layer(i, hidden, dense, dense_calls, shallow=needs_dense)
            after = layer.run_dense() if dense else []
            yield from self._visit_groups(layer, targets, done)
            self._leave_layer(layer, is_last=i == last)
            for kept in dense:
                kept.free()
            dense = after

    def _open_layer(
        self,
        i: int,
        hidden: list[Kept],
        dense: list[Kept],
        dense_calls: Sequence[list[LayerCall]],
        shallow: bool,
    ) -> LayerPass:
        """Begin the pass of a layer; blocks are looked for around the lone consumers of groups."""
        lone = [
            self.consumers[group.name][0]
            for group in self.groups
            if group.layer == i and len(self.consumers[group.name]) == 1
        ]
        candidates = [
            consumer
            for consumer in lone
            if consumer.is_linear and sum(consumer.module is other.module for other in lone) == 1
        ]
        return LayerPass(
            index=i,
            layer=self.layers[i],
            calls=[calls[i] for calls in self.recording.calls],
            dense_calls=[calls[i] for calls in dense_calls],
            written=self.recording.written,
            batches=self.batches,
            hidden=hidden,
            dense=dense,
            finder=Finder(self.layers[i], candidates, shallow),
            store=self.store,
        )

    def _visit_groups(
        self, layer: LayerPass, targets: Mapping[str, str], done: Container[str]
    ) -> Iterator[Visit]:
        """Yield the groups of a layer; the caller may change their consumers before going on."""
        groups = [group for group in self.groups if group.layer == layer.index]
        for group in groups:
            if group.name in self.whole or group.name in done:
                with together():
                    self._put_inputs_aside(layer, group)
                if group.name not in self.whole:
                    yield group, []
            else:
                with together():
                    target = targets.get(group.name, "pruned")
                    observation = self._observe(layer, group, target)
                yield group, observation.finish()
                block = layer.finder.block_of(self.consumers[group.name])
                if group is not groups[-1] and not layer.finder.shallow:
                    with together():
                        layer.fold(block)

    def _leave_layer(self, layer: LayerPass, is_last: bool) -> None:
        """Bring the hidden states behind the layer, then let its weights and blocks go."""
        if not is_last:
            with together():
                layer.advance()
        if self.source:
            self.source.leave(layer.index)
        for block in layer.finder.blocks:
            block.free()

    def _observe(self, layer: LayerPass, group: Group, target: str) -> Observation:
        """Gather the moments of what a group's consumers are fed, over all batches."""
        target = self._settle_target(layer, group, target)
        observation = Observation(
            self.consumers[group.name],
            targeted=target != "pruned",
            weighting=self.weigher.weighting,
            choosing=self.weigher.choosing,
            metric=self.weigher.metric_of(group.name),
        )
        weights = self.weigher.weigh(group.name, partial(self._find_norms, layer, group))
        self._feed(layer, group, observation, target, weights)
        observation.check()
        if observation.regrouped:
            self.weigher.say_once(group.name, "its tokens are regrouped: all weigh the same")
        return observation

    def _find_norms(self, layer: LayerPass, group: Group) -> Norms | None:
        """The norms that the token weights of a group come from; all processes agree on which."""
        block = layer.finder.block_of(self.consumers[group.name])
        if not hold_everywhere(block is not None, self.store.device):
            return None
        assert block is not None
        norms = stream_norms(layer, block, self.normed)
        if norms is None:
            self.weigher.say_once(group.name, OWN_NORM)
            return block_norms(layer, block)
        return norms

    def _put_inputs_aside(self, layer: LayerPass, group: Group) -> None:
        """Put aside what the consumer of a finished or whole group is fed, if it has a block."""
        self._feed(layer, group, None, "pruned", [(None, None)] * len(self.batches))

    def _settle_target(self, layer: LayerPass, group: Group, target: str) -> str:
        """The target itself, or the nearest one that exists for this group; all processes agree."""
        if target == "pruned":
            return target
        block = layer.finder.block_of(self.consumers[group.name])
        if not hold_everywhere(block is not None, self.store.device):
            self._say_once(
                "there is no single consumer whose output can be observed: target=pruned", group
            )
            return "pruned"
        assert block is not None
        if target == "residual" and not is_added(layer, block):
            self._say_once(
                "its output is not simply added to the residual stream: target=dense", group
            )
            return "dense"
        return target

    def _feed(
        self,
        layer: LayerPass,
        group: Group,
        observation: Observation | None,
        target: str,
        weights: Sequence[TokenWeights],
    ) -> None:
        """Run a layer on all batches as far as the consumers of a group.

        On the first batch it runs on to see whether a lone consumer has a block; the inputs of such
        a one are put aside, so that the block need not run again. In the first layer of a class it
        runs to its end, to see how often each consumer is fed.
        """
        consumers, finder = self.consumers[group.name], layer.finder
        block = finder.block_of(consumers)
        kind = type(layer.layer), *(finder.path_of(consumer.module) for consumer in consumers)
        for b, (sample, batch) in enumerate(self.batches):
            looks = block is None and b == 0 and finder.must_look_for(consumers)
            if observation is None and block is None and not looks:
                return  # there is nothing to observe, and nothing to put aside
            wanted = None
            if observation is not None and block is not None and target != "pruned":
                wanted = compute_target(layer, b, block, target)
            times = self.times.get(kind)
            stops_at = None if looks else times
            feeding = Feeding(
                consumers, observation, self.store, b, stops_at, needed=finder.shallow
            )
            if looks or block is not None:
                feeding.aside = {} if block is None else block.inputs
            observing = (
                observation.of(sample, batch, wanted, weights[b]) if observation else nullcontext()
            )
            stops = times == [1]
            looking = finder.looking(consumers[0], stops=stops) if looks else nullcontext()
            with observing, watching(consumers, feeding.see), looking:
                layer.run_pruned(b)
            if all(counted := feeding.counted()):
                self.times.setdefault(kind, counted)
            if looks:
                block = finder.block_of(consumers)
                feeding.hand_over(block)

    def _say_once(self, reason: str, group: Group) -> None:
        if reason not in self.said:
            self.said.add(reason)
            say(f"{group.name}, and others like it: {reason} is taken")


def _count_rows(batches: Sequence[Numbered], device: torch.device) -> int:
    """Number of calibration samples in all processes."""
    rows = sum(count_positions(batch)[0] for _, batch in batches)
    return int(add_up(torch.tensor([rows], device=device)))
