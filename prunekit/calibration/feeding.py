"""What happens to the inputs of a group's consumers while a layer runs on one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from prunekit.calibration.blocks import Block
from prunekit.calibration.consumers import Consumer
from prunekit.calibration.hooks import Stop
from prunekit.calibration.observe import Observation
from prunekit.calibration.store import Kept, Store


@dataclass
class Feeding:
    """Takes in the inputs of consumers in one pass of a layer on one batch.

    `observation`: takes them in, if given. `aside`: keeps them by batch, if given, and if they are
    `needed`; else only where they stay near: a GPU computes them again before they have gone to the
    host and come back. `times`: how often each consumer is fed in a pass, which then ends; None:
    that is counted, in a whole pass.
    """

    consumers: Sequence[Consumer]
    observation: Observation | None
    store: Store
    batch: int
    times: Sequence[int] | None
    aside: dict[int, Kept] | None = None
    needed: bool = False

    def __post_init__(self) -> None:
        self.counts = Counter[Consumer]()

    def see(self, consumer: Consumer, inputs: Tensor) -> None:
        """Take in the inputs [..., n] of a consumer.

        Raises:
            Stop: all consumers have been fed all that they are.
        """
        if self.observation is not None:
            self.observation.see(consumer, inputs)
        if self.aside is not None and (self.needed or self.store.is_near(inputs.nbytes)):
            self.aside[self.batch] = self.store.put(inputs)
        self.counts[consumer] += 1
        if self.times is not None and self.counted() == self.times:
            raise Stop

    def counted(self) -> list[int]:
        """How often each consumer has been fed in this pass."""
        return [self.counts[consumer] for consumer in self.consumers]

    def hand_over(self, block: Block | None) -> None:
        """Give the inputs put aside to the block that was found, or let go of them."""
        assert self.aside is not None
        if block is not None:
            block.inputs.update(self.aside)
            return
        for kept in self.aside.values():
            kept.free()
