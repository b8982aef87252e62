"""Seconds and peak memory of the stages of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from prunekit.runtime.memory import peak_memory, reset_peak


@dataclass
class Stages:
    """Measures the stages of a run, each as `with stages("prune"): ...`.

    Args:
        device: the device whose memory is measured.
        seconds: stage → seconds; their sum, for a stage that runs several times.
        peak_memory_bytes: stage → peak bytes; the largest, for a stage that runs several times.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure one stage; a stage that fails is not noted."""
        reset_peak(self.device)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)
        self.peak_memory_bytes[name] = max(
            peak_memory(self.device), self.peak_memory_bytes.get(name, 0)
        )
