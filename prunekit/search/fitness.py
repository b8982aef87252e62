"""Fitness: KL(dense ‖ model) of the next token, over the whole vocabulary, mean over positions.

Where the layers can be run one by one, a model that differs from another from one layer on is run
from there only, on the hidden states that the other has before this layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.calls import Recording, copy_containers, record_calls
from prunekit.calibration.hooks import replacing, return_always
from prunekit.calibration.store import Kept, Store
from prunekit.calibration.walk import number_batches
from prunekit.data.batches import Batch, copy_batch, count_positions, padding_mask
from prunekit.errors import ConfigError
from prunekit.graph import Group
from prunekit.model.stack import stacks_around
from prunekit.search.halves import computing_in_halves, judges_in_halves

_tree = torch.utils._pytree

CHUNK = 2048  # tokens of logits in float32 at once, at most
# Elements of a temporary tensor: one that stays in the cache of a processor; one for whose size few
# kernels of a GPU are launched.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
# Of the dense model's probabilities, on its first batches; later ones are computed each time.
_KEPT_BYTES = 1 << 30

States = list[list[Kept]]  # [layer][batch], the hidden states before each layer


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The sum of KL(dense ‖ model) over the positions of each sample, and how many they are.

    Both are float64 [samples], on the CPU.
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    def none(cls) -> Divergence:
        """The divergence of no sample."""
        return cls(sums=torch.zeros(0).double(), counts=torch.zeros(0).double())

    @property
    def mean(self) -> float:
        """The mean over all positions."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def means(self) -> Tensor:
        """The mean of each sample [samples]."""
        return self.sums / self.counts.clamp_min(1)

    def to_json(self) -> list[list[float]]:
        """The sums and the counts as lists."""
        return [self.sums.tolist(), self.counts.tolist()]

    @classmethod
    def from_json(cls, content: Sequence[Sequence[float]]) -> Divergence:
        """What `to_json` wrote."""
        sums, counts = (torch.tensor(part, dtype=torch.float64) for part in content)
        return cls(sums=sums, counts=counts)

    def __add__(self, other: Divergence) -> Divergence:
        """The divergences of both sets of samples."""
        return Divergence(
            sums=torch.cat([self.sums, other.sums]), counts=torch.cat([self.counts, other.counts])
        )


def subtract(one: Divergence, other: Divergence) -> tuple[float, float]:
    """By how much one KL is above another on the same samples, and the standard error of that.

    Both are over the differences of single samples; the error on one sample is infinite.
    """
    differences = one.means - other.means
    if len(differences) < 2:
        return float(differences.mean()), math.inf
    return float(differences.mean()), float(differences.std() / len(differences) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """What the dense model says about one batch of N positions.

    Attributes:
        probabilities: those of the next token, [n, V] for n positions after another; None where
            they are computed each time.
        last: the output of the last layer, where they are: a tree of what the store keeps.
        entropy: float32 or float64 [N].
    """

    probabilities: list[Kept] | None
    last: Any
    entropy: Tensor


class Judge:
    """Compares a model, as it is by now, with the dense one that it was at first.

    Args:
        model: the dense model.
        groups: the groups that are cut, which tell where its layers are.
        batches: what it is judged on.
        store: keeps hidden states, and the dense model's probabilities.
        trailed: on so many of the first batches a model may be run from any layer on; on the others
            it is run as a whole, and no hidden states are kept behind the first layer.

    Attributes:
        layers: how many layers the model has.
        states: the dense model's hidden states before every layer.
        tokens_run: tokens that went through the whole model so far; through half of it, half.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        store: Store,
        trailed: int,
    ) -> None:
        self.model, self.batches, self.store, self.trailed = model, batches, store, trailed
        self.tokens_run = 0.0
        self._halves = judges_in_halves(model)
        self._stack, self._recording = _record(model, groups, batches, store)
        self.layers = len(self._stack)
        self.states = self.trail(0, [self._recording.hidden])
        self._references = [self._refer(b) for b in range(len(batches))]

    def tokens(self, batch: int) -> int:
        """How many positions a batch has."""
        rows, length = count_positions(self.batches[batch])
        return rows * length

    def measure(self, batch: int, first: int = 0, states: States | None = None) -> Divergence:
        """KL(dense ‖ model) on a batch, run from the layer `first` on the `states` before it."""
        hidden = (states or self.states)[first][batch].get(copy=True)
        return self._compare(batch, self._run(batch, first, hidden))

    def trail(self, first: int, states: States) -> States:
        """The model's hidden states before every layer, on the batches that are trailed.

        Those up to the layer `first` are the `states` of another model.
        """
        trail: States = [*states[: first + 1], *([] for _ in range(first + 1, self.layers))]
        for b in range(self.trailed):
            self._run(b, first, states[first][b].get(copy=True), trail)
        return trail

    @torch.no_grad()
    def _run(self, batch: int, first: int, hidden: Tensor, trail: States | None = None) -> Any:
        """Run the layers from `first` on; the output of the last one.

        With a `trail`, the states before each layer behind the first are added to it, and the last
        layer need not run.
        """
        calls, output = self._recording.calls[batch], None
        begins = first
        if self._recording.written:
            first, calls = 0, copy_containers(calls)
            hidden = self._recording.hidden[batch].get(copy=True)
        for i in range(first, self.layers):
            if trail is not None and i > begins:
                trail[i].append(self.store.put(hidden))
            if trail is not None and i == self.layers - 1:
                break
            with computing_in_halves(self._halves):
                output = calls[i].make(self._stack[i], hidden)
            hidden = output if isinstance(output, Tensor) else output[0]
        self.tokens_run += (self.layers - first) / self.layers * self.tokens(batch)
        return output

    @torch.no_grad()
    def _logits(self, batch: int, last: Any) -> Iterator[Tensor]:
        """Logits [n, V] behind the output of the last layer, for n positions after another.

        They are at most `CHUNK` where one sample is longer: the norm and the head behind the layers
        look at each position alone.
        """
        rows, length = count_positions(self.batches[batch])
        size = CHUNK if rows == 1 else length
        for start in range(0, length, size):
            part = last if size >= length else _take_positions(last, start, size)
            with ExitStack() as stack:
                for layer in self._stack:
                    stack.enter_context(replacing(layer, partial(return_always, part)))
                stack.enter_context(computing_in_halves(self._halves))
                outputs = self.model(**copy_batch(self.batches[batch]))
            logits = outputs.logits
            expected = (rows, min(size, length - start))
            if not isinstance(logits, Tensor) or logits.shape[:-1] != expected:
                raise ConfigError("policy=search: expected a language model, which returns logits")
            flat = logits.flatten(0, 1)
            yield from flat.split(_chunk(flat))

    def _refer(self, batch: int) -> _Reference:
        first = self.layers - 1 if batch < self.trailed else 0
        last = self._run(batch, first, self.states[first][batch].get(copy=True))
        entropies, kept, keeps = [], [], False
        positions = sum(map(self.tokens, range(batch + 1)))
        for chunk in self._logits(batch, last):
            keeps = positions * chunk.shape[-1] * 4 <= _KEPT_BYTES
            logs = torch.log_softmax(_widen(chunk), -1)
            probabilities = logs.exp()
            entropies.append(-(probabilities * logs).sum(-1))
            if keeps:
                kept.append(self.store.put(probabilities, copy=False))
        return _Reference(
            probabilities=kept if keeps else None,
            last=None if keeps else _tree.tree_map_only(Tensor, self.store.put, last),
            entropy=torch.cat(entropies),
        )

    def _compare(self, batch: int, last: Any) -> Divergence:
        reference = self._references[batch]
        values = []
        for own, dense in zip(
            self._logits(batch, last), self._probabilities(batch, reference), strict=True
        ):
            own = _widen(own)
            values.append(torch.logsumexp(own, -1) - (dense * own).sum(-1))
        divergences = torch.cat(values) - reference.entropy
        return _by_sample(divergences, self.batches[batch])

    def _probabilities(self, batch: int, reference: _Reference) -> Iterator[Tensor]:
        """The dense model's probabilities [n, V] of the same positions as `_logits` gives."""
        if reference.probabilities is not None:
            for kept in reference.probabilities:
                yield kept.get()
            return
        last = _tree.tree_map_only(Kept, Kept.get, reference.last)
        for logits in self._logits(batch, last):
            yield torch.softmax(_widen(logits), -1)


def _record(
    model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch], store: Store
) -> tuple[nn.ModuleList, Recording]:
    paths = stacks_around(model, [group.module for group in groups])
    path = next(iter(paths), None)
    layers = model.get_submodule(path) if path is not None and len(paths) == 1 else None
    recording = None
    if isinstance(layers, nn.ModuleList):
        recording = record_calls(model, layers, number_batches(batches), store)
    if recording is None:
        raise ConfigError(
            "policy=search: expected groups in one list of layers, which can be run one by one"
        )
    assert isinstance(layers, nn.ModuleList)
    return layers, recording


def _take_positions(last: Any, start: int, size: int) -> Any:
    """The output of a layer, whose hidden states are [B, T, d], at some of the positions."""
    if isinstance(last, Tensor):
        return last[:, start : start + size]
    return (last[0][:, start : start + size], *last[1:])


def _chunk(logits: Tensor) -> int:
    """Rows of logits [N, V] that are computed on at once."""
    elements = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS["cpu"])
    return max(min(CHUNK, elements // logits.shape[-1]), 1)


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _by_sample(divergences: Tensor, batch: Batch) -> Divergence:
    rows, length = count_positions(batch)
    values, mask = divergences.view(rows, length).double(), padding_mask(batch)
    if mask is not None:
        values = values.masked_fill(~mask.to(values.device), 0)
    counts = mask.sum(1) if mask is not None else torch.full((rows,), length)
    return Divergence(sums=values.sum(1).cpu(), counts=counts.double().cpu())
