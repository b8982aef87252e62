"""Walk the groups of a model in execution order; show each the moments of its consumers' inputs.

Between two groups the caller may change the weights of the consumers: later groups see the
activations that these give (SlimGPT: a layer's inputs come from the pruned layers before it; inside
a layer attention comes first, then the FFN on its new inputs).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from prunekit.calibration.consumers import (
    Consumer,
    find_consumers,
    running_experts_in_turn,
    watching,
)
from prunekit.calibration.layers import Layers
from prunekit.calibration.moments import Moments
from prunekit.calibration.observe import Observation, Site, TokenWeights
from prunekit.calibration.padding import remove_padding
from prunekit.calibration.store import Store
from prunekit.calibration.stream import Stream, Visit
from prunekit.calibration.token_norms import Norms, output_norms
from prunekit.calibration.weigher import OWN_NORM, Weigher, lone
from prunekit.calibration.weighting import EQUAL, Outputs, Weighting
from prunekit.data.batches import (
    Batch,
    Numbered,
    copy_batch,
    count_positions,
)
from prunekit.errors import ConfigError, DataError, TraceError
from prunekit.graph import Group
from prunekit.runtime.console import say
from prunekit.runtime.modes import evaluating
from prunekit.runtime.processes import own_part, together, world_size

__all__ = ["Batch", "Consumer", "Layers", "Moments", "Site", "Walk", "find_consumers"]


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A way through a model.

    `targets`: group name → "dense" or "residual" (`Compensation.target_of`); the consumers of other
    groups must reproduce their own outputs on the inputs that they get.
    `around`: the groups of the model in execution order, whole ones too, as far as they are known:
    a target needs to know those beside its own.
    `done`: the names of groups that are finished; nothing is measured there.
    `weighting`: how tokens are weighed in the moments; `choosing`: how in the moments by which
    units are chosen, None: alike; `outputs`: how errors in the outputs are weighed there.
    `store`: keeps activations between two layers.
    `layers`: reads the weights of the layers; None where all are in memory.
    """

    model: nn.Module
    groups: Sequence[Group]
    batches: Sequence[Batch]
    targets: Mapping[str, str] = field(default_factory=dict)
    around: Sequence[Group] = ()
    done: Container[str] = ()
    store: Store | None = None
    layers: Layers | None = None
    weighting: Weighting = EQUAL
    choosing: Weighting | None = None
    outputs: Outputs = "equal"

    def __iter__(self) -> Iterator[Visit]:
        """Yield (group, sites) in execution order; the caller may change consumers in between.

        Groups whose consumers are used more than once, as layers share them, come before all others
        on what the dense layers feed every use: so whatever is cut later sees them as they stay.

        Every site holds consumers that are fed the same inputs, and the moments of these inputs. A
        group that is done has no sites.

        Raises:
            DataError: NaN or infinity among the activations; fewer batches than processes; padding
                that can't be removed.
            TraceError: a group without linear consumers; streamed layers that can't be run one by
                one.
            ConfigError: token weights from gradients of a streamed model.
        """
        consumers = {group.name: find_consumers(self.model, group) for group in self.groups}
        everyone = [consumer for own in consumers.values() for consumer in own]
        batches = self._own_batches()
        store = self.store or Store(next(self.model.parameters()).device)
        try:
            with evaluating(self.model), running_experts_in_turn(self.model, everyone):
                weigher = self._open_weigher(consumers, batches)
                visit_whole = partial(self._visit_with_whole_passes, batches, weigher)
                again = {n: own for n, own in consumers.items() if any(c.is_reused for c in own)}
                if again:
                    name = next(iter(again))
                    yield from visit_whole(again, f"{name}: its weights are used more than once")
                once = {n: own for n, own in consumers.items() if n not in again}
                groups = [group for group in self.groups if group.name in once]
                stream = Stream.open(self.model, groups, once, batches, store, self.layers, weigher)
                if stream is not None:
                    if whose := once.keys() if weigher.needs_norms else self.targets.keys():
                        stream.bring_along(self.model, self.around, whose)
                    yield from stream.walk(self.targets, self.done)
                elif once:
                    yield from visit_whole(once, "the layers can't be run one by one")
        finally:
            store.close()

    def _own_batches(self) -> list[Numbered]:
        """The batches of this process without padding, numbered."""
        batches = remove_padding(self.model, self.batches)
        if len(batches) < world_size():
            raise DataError(
                f"expected a batch for each of {world_size()} processes, got {len(batches)}: "
                "lower data.calibration.batch_size"
            )
        return own_part(number_batches(batches))

    def _open_weigher(
        self, consumers: Mapping[str, list[Consumer]], batches: Sequence[Numbered]
    ) -> Weigher:
        """The token weights of all groups."""
        tokens = (self.weighting.tokens, (self.choosing or EQUAL).tokens)
        if self.layers and ("gradient" in tokens or self.outputs != "equal"):
            option = "tokens=gradient" if "gradient" in tokens else f"outputs={self.outputs}"
            raise ConfigError(
                f"{option}: expected the whole model in memory (memory.stream=false), whose "
                "gradients take all layers at once; "
                "tokens=relative and outputs=equal do without"
            )
        return Weigher.open(
            self.model, consumers, batches, self.weighting, self.choosing, self.outputs
        )

    def _visit_with_whole_passes(
        self,
        batches: Sequence[Numbered],
        weigher: Weigher,
        consumers: Mapping[str, list[Consumer]],
        why: str,
    ) -> Iterator[Visit]:
        """Yield (group, sites) where every group takes forward passes of the whole model.

        `consumers`: those of the groups. `why`: the reason for the messages.
        """
        if self.layers:
            raise TraceError(f"memory.stream: {why}; load the model whole (memory.stream=false)")
        say(f"{why}: each of {len(consumers)} groups takes forward passes of the whole model")
        norms: dict[str, Norms] = {}
        if weigher.needs_norms:
            weigher.say_once("tokens", OWN_NORM)
            norms = output_norms(self.model, lone(consumers), [batch for _, batch in batches])
        for group in (group for group in self.groups if group.name in consumers):
            if group.name in self.done:
                yield group, []
            else:
                weights = weigher.weigh(group.name, partial(norms.get, group.name))
                observation = Observation(
                    consumers[group.name],
                    weighting=weigher.weighting,
                    choosing=weigher.choosing,
                    metric=weigher.metric_of(group.name),
                )
                yield group, observe_whole_model(self.model, observation, batches, weights)


def number_batches(batches: Sequence[Batch]) -> list[Numbered]:
    """Each batch with the number of its first sample."""
    numbered, count = [], 0
    for batch in batches:
        numbered.append((count, batch))
        count += count_positions(batch)[0]
    return numbered


@torch.no_grad()
def observe_whole_model(
    model: nn.Module,
    observation: Observation,
    batches: Sequence[Numbered],
    weights: Sequence[TokenWeights],
) -> list[Site]:
    """The sites of consumers, after a forward pass of the whole model on each batch."""
    consumers = observation.consumers
    with together():
        for (sample, batch), weigh in zip(batches, weights, strict=True):
            observing = observation.of(sample, batch, weights=weigh)
            with observing, watching(consumers, observation.see):
                model(**copy_batch(batch))
        observation.check()
    return observation.finish()
