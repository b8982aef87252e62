"""Walk a model's groups in execution order and show each one the second moments of its consumers'
inputs.

Between two groups the caller may change the consumers' weights: what comes later sees the new
activations (SlimGPT: the inputs of a layer come from the pruned layers before it; in a layer
attention first, then its FFN on the new inputs).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from prunekit.calibration.consumers import Consumer, consumers_of, experts_in_turn, watched
from prunekit.calibration.layers import Layers
from prunekit.calibration.moments import Moments
from prunekit.calibration.observe import Observation, Site
from prunekit.calibration.store import Store
from prunekit.calibration.stream import Stream
from prunekit.data.batches import Batch, Numbered, copy_batch, count_positions, remove_padding
from prunekit.errors import DataError, TraceError
from prunekit.graph import Group
from prunekit.runtime.console import say
from prunekit.runtime.modes import evaluating
from prunekit.runtime.processes import own_part, together, world_size

__all__ = ["Batch", "Consumer", "Layers", "Moments", "Site", "Walk", "consumers_of"]


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How to go through a model.

    `targets`: group name → dense or residual, where its consumers must reproduce more than what
    they compute on the inputs they get; `done`: groups that are as they will be: nothing is
    measured there. `store`: where activations wait, `layers`: where the layers' weights come from,
    if not from memory.
    """

    model: nn.Module
    groups: Sequence[Group]
    batches: Sequence[Batch]
    targets: Mapping[str, str] = field(default_factory=dict)
    done: Container[str] = ()
    store: Store | None = None
    layers: Layers | None = None

    def __iter__(self) -> Iterator[tuple[Group, list[Site]]]:
        """Yield (group, sites) in execution order; the caller may change the consumers before going
        on.

        Every site holds consumers that are fed the same inputs, and the moments of these. Without
        sites: a group that is done.

        Raises:
            DataError: NaN or infinity among the activations.
        """
        consumers = {group.name: consumers_of(self.model, group) for group in self.groups}
        store = self.store or Store(next(self.model.parameters()).device)
        everyone = [consumer for found in consumers.values() for consumer in found]
        experts = any(consumer.expert is not None for consumer in everyone)
        batches = (
            remove_padding(self.batches) if experts else self.batches
        )  # routed tokens no longer know their place
        if len(batches) < world_size():
            raise DataError(
                f"expected a batch for each of {world_size()} processes, got {len(batches)}: "
                "lower data.calibration.batch_size"
            )
        numbered = own_part(_numbered(batches))
        try:
            with evaluating(self.model), experts_in_turn(self.model, everyone):
                stream = Stream.open(
                    self.model, self.groups, consumers, numbered, store, self.layers
                )
                if stream is not None:
                    yield from stream.walk(self.targets, self.done)
                    return
                if self.layers:
                    raise TraceError(
                        "memory.stream: the layers can't be run one by one; load the model whole "
                        "(memory.stream=false)"
                    )
                say(
                    "the layers can't be run one by one: every group takes forward passes of the whole model"
                )
                for group in self.groups:
                    done = group.name in self.done
                    yield (
                        group,
                        [] if done else _observed(self.model, consumers[group.name], numbered),
                    )
        finally:
            store.close()


def _numbered(batches: Sequence[Batch]) -> list[Numbered]:
    """Each batch with the number of its first sample."""
    found, count = [], 0
    for batch in batches:
        found.append((count, batch))
        count += count_positions(batch)[0]
    return found


def _observed(
    model: nn.Module, consumers: Sequence[Consumer], batches: Sequence[Numbered]
) -> list[Site]:
    observation = Observation(consumers)
    with together():
        for sample, batch in batches:
            with (
                observation.of(sample, batch),
                watched(consumers, observation.see),
                torch.no_grad(),
            ):
                model(**copy_batch(batch))
    return observation.finish()
