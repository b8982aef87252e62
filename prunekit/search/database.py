"""The database: what the consumers of every group hold at each of its levels.

One layer-wise walk makes it. Units are chosen once for the highest level of a group; what goes
first goes at every level, so that one pass of the greedy choice serves all levels. The walk goes on
with the level that is expected there, because later levels must fit the inputs that it gives.
Without a compensation a level is a mask, and no weights are kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.calibration.consumers import Consumer, find_consumers
from prunekit.calibration.store import Kept, Store
from prunekit.errors import ConfigError
from prunekit.graph import Group
from prunekit.graph.groups import kept_positions


@dataclass(frozen=True, kw_only=True)
class Content:
    """What one consumer holds at a level: its columns [d, kept] that stay, and its bias [d]."""

    weight: Kept
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Level:
    """A group at one of its levels: the units that are gone, and what its consumers hold.

    `contents` has an entry for each consumer, or none at all where the level is a mask.
    """

    units: list[int]
    contents: list[Content]


class Database:
    """The levels of all groups, and the ones that the model holds at present.

    Args:
        model: the dense model, whose consumers are about to change.
        groups: the groups that are cut.
        store: keeps the weights.
        halves: weights are kept in bfloat16, in which they are judged anyway.

    Raises:
        ConfigError: two groups own columns of one matrix.

    Attributes:
        placed: group → units removed from it in the model as it is by now.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], store: Store, *, halves: bool = False
    ) -> None:
        self.store, self.halves = store, halves
        self.placed = {group.name: 0 for group in groups}
        self._consumers = {group.name: find_consumers(model, group) for group in groups}
        _expect_own_matrices(self._consumers)
        self._dense = {
            name: [(_copy_weight(consumer), _copy_bias(consumer)) for consumer in consumers]
            for name, consumers in self._consumers.items()
        }
        self._levels: dict[str, dict[int, Level]] = {name: {} for name in self._consumers}

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are kept."""
        return sum(content.weight.nbytes for content in self._contents())

    def dtype_of(self, weight: Tensor) -> torch.dtype:
        """The dtype that the levels of a weight are kept in."""
        return torch.bfloat16 if self.halves else weight.dtype

    def count_bytes(self, levels: Mapping[str, Sequence[int]]) -> int:
        """Bytes of the weights at levels at which so many units of each group are gone."""
        total = 0
        for name, counts in levels.items():
            for consumer in self._consumers[name]:
                units, width = consumer.member.index.shape
                columns = sum((units - count) * width for count in set(counts) - {0})
                total += columns * consumer.outputs * self.dtype_of(consumer.parameter).itemsize
        return total

    def units(self, counts: Mapping[str, int]) -> dict[str, list[int]]:
        """Group → the units that are gone at these levels."""
        return {n: list(self._levels[n][count].units) for n, count in counts.items() if count}

    def place(self, counts: Mapping[str, int]) -> None:
        """Give every group the level at which so many units are gone; other groups are dense."""
        for name, placed in self.placed.items():
            if (count := counts.get(name, 0)) != placed:
                self._place(name, count)

    def _place(self, name: str, count: int) -> None:
        self.placed[name] = count
        self.reset(name)
        if count == 0:
            return
        level = self._levels[name][count]
        for i, consumer in enumerate(self._consumers[name]):
            weight, columns = self._dense[name][i][0], _columns(consumer, level.units)
            if not level.contents:
                consumer.store(weight.index_fill(1, columns, 0))
                continue
            content = level.contents[i]
            kept = kept_positions(weight.shape[1], columns)
            own = content.weight.get().to(weight)
            consumer.store(torch.zeros_like(weight).index_copy_(1, kept, own))
            if content.bias is not None:
                consumer.set_bias(content.bias)

    def reset(self, name: str) -> None:
        """Give the consumers of a group their dense weights; a bias that was none is zero."""
        for consumer, (weight, bias) in zip(self._consumers[name], self._dense[name], strict=True):
            consumer.store(weight)
            if bias is not None:
                consumer.set_bias(bias)
            elif consumer.bias is not None:
                consumer.set_bias(torch.zeros_like(consumer.bias))

    def reset_all(self) -> None:
        """Give all consumers their dense weights, whatever they hold at present."""
        for name in self.placed:
            self._place(name, 0)

    def close(self) -> None:
        """Give the model back as it was: consumers are dense, and a bias that was none goes."""
        self.reset_all()
        for name, consumers in self._consumers.items():
            for consumer, (_, bias) in zip(consumers, self._dense[name], strict=True):
                if bias is None and consumer.bias is not None:
                    consumer.drop_bias()

    def note_mask(self, name: str, units: Sequence[int]) -> None:
        """Add a level of which only the units that are gone need be known."""
        self._levels[name][len(units)] = Level(units=list(units), contents=[])

    def note(self, name: str, units: Sequence[int]) -> None:
        """Add the level that the consumers of a group hold at present."""
        contents = []
        for consumer in self._consumers[name]:
            weight = _copy_weight(consumer)
            kept = kept_positions(weight.shape[1], _columns(consumer, units))
            columns = weight.index_select(1, kept)
            own = self.store.put(columns.to(self.dtype_of(consumer.parameter)), copy=False)
            contents.append(Content(weight=own, bias=_copy_bias(consumer)))
        self._levels[name][len(units)] = Level(units=list(units), contents=contents)

    def describe(self, name: str) -> dict[str, Tensor]:
        """All levels of a group as named tensors, which `restore` takes."""
        tensors = {}
        for count, level in self._levels[name].items():
            tensors[f"{count}.units"] = torch.tensor(level.units, dtype=torch.long)
            for i, content in enumerate(level.contents):
                tensors[f"{count}.{i}.weight"] = content.weight.get().cpu()
                if content.bias is not None:
                    tensors[f"{count}.{i}.bias"] = content.bias.cpu()
        return tensors

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Give a group the levels that `describe` told of."""
        consumers = self._consumers[name]
        for key in (key for key in tensors if key.endswith(".units")):
            count, contents = int(key.removesuffix(".units")), list[Content]()
            for i, consumer in enumerate(consumers):
                weight = tensors.get(f"{count}.{i}.weight")
                if weight is None:
                    break  # a mask
                kept = self.store.put(weight.to(consumer.parameter.device), copy=False)
                bias = tensors.get(f"{count}.{i}.bias")
                if bias is not None:
                    bias = bias.to(consumer.parameter.device)
                contents.append(Content(weight=kept, bias=bias))
            self._levels[name][count] = Level(units=tensors[key].tolist(), contents=contents)

    def clear(self) -> None:
        """Let go of all levels; the consumers are dense again."""
        self.place({})
        for content in self._contents():
            content.weight.free()
        self._levels = {name: {} for name in self._levels}

    def _contents(self) -> Iterator[Content]:
        for levels in self._levels.values():
            for level in levels.values():
                yield from level.contents


def _expect_own_matrices(consumers: Mapping[str, Sequence[Consumer]]) -> None:
    """Raise ConfigError where two groups own columns of one matrix: a level is a whole matrix."""
    owners: dict[tuple[int, int | None], str] = {}
    for name, own in consumers.items():
        for consumer in own:
            other = owners.setdefault((id(consumer.parameter), consumer.expert), name)
            if other != name:
                raise ConfigError(
                    f"policy=search: expected groups with matrices of their own, got {other} and "
                    f"{name}, which both own columns of {consumer.name}; search one of them"
                )


def _copy_weight(consumer: Consumer) -> Tensor:
    """W [d, n] of a consumer, in the dtype that it is stored in."""
    return consumer.weight().to(consumer.parameter.dtype)


def _copy_bias(consumer: Consumer) -> Tensor | None:
    return None if consumer.bias is None else consumer.bias.detach().clone()


def _columns(consumer: Consumer, units: Sequence[int]) -> Tensor:
    """The columns [k] of a consumer that these units own."""
    index = consumer.member.index[torch.tensor(units, dtype=torch.long)]
    return index.flatten().to(consumer.parameter.device)
