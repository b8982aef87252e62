"""Safetensors shards read by name: headers once, then single tensors, and never a whole file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.checkpoint.files import INDEX, refuse_adapter, weight_map
from prunekit.errors import CheckpointError, first_line

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ROWS = 4096  # rows of two matrices that are compared at a time


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a shard: its file, its name there, its shape and its type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def places(self, whole: Tensor) -> Iterator[tuple[Stored, Tensor]]:
        """Pairs: a stored part of a tensor, and the view of the whole tensor that it belongs in."""
        yield self, whole


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A tensor put together of several: every row of parts is stacked, then the rows are joined.

    Args:
        folder: the folder that the parts are in.
        rows: rows of parts, in order; of one part each where nothing is stacked.
        stacked: the new dimension along which the parts of a row lie; none if None.
        joined: the dimension along which the rows follow one another; there is one row if None.
        shape: the shape of the whole tensor.
        dtype: the number type of the whole tensor.
        widths: the sizes of the rows along `joined`.
    """

    folder: Path
    rows: tuple[tuple[Stored, ...], ...]
    stacked: int | None
    joined: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    widths: tuple[int, ...]

    @property
    def file(self) -> Path:
        """The folder, as the parts may lie in several files."""
        return self.folder

    @property
    def num_bytes(self) -> int:
        """The bytes of its parts in their files."""
        return sum(part.num_bytes for row in self.rows for part in row)

    def places(self, whole: Tensor) -> Iterator[tuple[Stored, Tensor]]:
        """Pairs: a stored part of a tensor, and the view of the whole tensor that it belongs in."""
        rows = (whole,) if self.joined is None else whole.split(self.widths, self.joined)
        for row, parts in zip(rows, self.rows, strict=True):
            yield from zip(
                parts, (row,) if self.stacked is None else row.unbind(self.stacked), strict=True
            )


@dataclass(frozen=True)
class Shards:
    """Name of a tensor → where it is stored, whole or in parts: of a folder or of some files."""

    where: Path
    entries: Mapping[str, Stored | Composed]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, folder: Path) -> Shards:
        """Read the headers of a folder's `model.safetensors`, or of the shards its index lists.

        Raises:
            CheckpointError: none there; or an index or shard that is missing, cut short or damaged.
        """
        if not (folder / INDEX).exists():
            if not (folder / "model.safetensors").exists():
                refuse_adapter(folder)
                raise CheckpointError(
                    f"{folder}: expected safetensors in the model folder, found none"
                )
            return cls(folder, cls.of_file(folder / "model.safetensors").entries)
        places = weight_map(folder)
        files = {file: cls.of_file(folder / file) for file in sorted(set(places.values()))}
        for name, file in places.items():
            if name not in files[file]:
                raise CheckpointError(f"{folder / file}: damaged weights: {name} is missing")
        return cls(folder, {name: files[file][name] for name, file in places.items()})

    @classmethod
    def of_file(cls, file: Path) -> Shards:
        """Read one file's header; CheckpointError where it is missing, cut short or damaged."""
        entries = {}
        with _open(file) as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                part = stored.get_slice(name)
                if (dtype := part.get_dtype()) not in _DTYPES:
                    raise CheckpointError(
                        f"{file}: {name} is stored as {dtype}: expected one of {', '.join(_DTYPES)}"
                    )
                shape = tuple(part.get_shape())
                entries[name] = Stored(file=file, name=name, shape=shape, dtype=_DTYPES[dtype])
            return cls(file, entries, stored.metadata() or {})

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Stored | Composed:
        if name not in self.entries:
            raise CheckpointError(f"{self.where}: damaged weights: {name} is missing")
        return self.entries[name]

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(stored.num_bytes for stored in self.entries.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that most bytes are stored in; float32 where there is none."""
        sizes: Counter[torch.dtype] = Counter()
        for stored in self.entries.values():
            sizes[stored.dtype] += stored.num_bytes if stored.dtype.is_floating_point else 0
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

    def read(
        self,
        names: Iterable[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        pinned: bool = False,
    ) -> dict[str, Tensor]:
        """Copies of tensors on a device, floating ones as `dtype`; no page of a file stays mapped.

        Parts go to their place one by one: beside a tensor there is never more than one of its
        parts. Host memory is `pinned` where that is asked for.

        Raises:
            CheckpointError: a name is missing, or its file is by now.
        """
        tensors: dict[str, Tensor] = {}
        places: list[tuple[Stored, Tensor]] = []
        for name in names:
            own = dtype if self[name].dtype.is_floating_point else None
            tensors[name] = torch.empty(
                self[name].shape,
                dtype=own or self[name].dtype,
                device=device,
                pin_memory=pinned,
            )
            places += self[name].places(tensors[name])
        for file in {part.file: None for part, _ in places}:
            with _open(file) as stored:
                for part, place in places:
                    if part.file == file:
                        place.copy_(stored.get_tensor(part.name))
        return tensors

    def equal(self, left: str, right: str) -> bool:
        """Whether two matrices hold the same numbers, compared some rows at a time."""
        one, other = self[left], self[right]
        if one.shape != other.shape:
            return False
        if isinstance(one, Composed) or isinstance(other, Composed):
            return torch.equal(self.read([left])[left], self.read([right])[right])
        with _open(one.file) as first, _open(other.file) as second:
            a, b = first.get_slice(one.name), second.get_slice(other.name)
            rows = range(0, one.shape[0], _ROWS)
            return all(torch.equal(a[row : row + _ROWS], b[row : row + _ROWS]) for row in rows)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A safetensors file, which is unmapped at the end of the `with` block.

    Opening it compares its header with its size.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt", device="cpu") as stored:
            yield stored
    except FileNotFoundError:
        raise CheckpointError(f"{file}: expected a shard of the model, found none") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: damaged weights: {first_line(error)}") from error
