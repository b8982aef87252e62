"""The calibration samples in three parts that share no text: database, fitness, held out.

Windows drawn from one document may overlap. Samples that share a run of tokens stay in one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from prunekit.data.batches import Batch, count_positions, take_rows
from prunekit.errors import DataError

_RUN = 32  # equal tokens in a row that tell that two samples share text
Place = tuple[int, int]  # the number of a batch, and a row of it


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The parts of the calibration samples.

    Attributes:
        database: what the levels of the groups are repaired on.
        fitness: what children are judged on, in batches of few tokens.
        held_out: what the winner is compared with the seeds on, in batches of few tokens.
    """

    database: list[Batch]
    fitness: list[Batch]
    held_out: list[Batch]


def split_samples(
    batches: Sequence[Batch], fitness: float, held_out: float, tokens: int
) -> Samples:
    """Set shares of the samples aside, at least one sample each; the database gets the others.

    Args:
        batches: the calibration set.
        fitness: the share of the samples that children are judged on.
        held_out: the share of the samples that the winner is checked on.
        tokens: the most tokens of a batch of the parts that are set aside, one sample at least.

    Raises:
        DataError: too few samples that share no text.
    """
    rows = [(b, row) for b, batch in enumerate(batches) for row in range(count_positions(batch)[0])]
    clusters = _cluster(batches, rows)
    parts = []
    for share in (held_out, fitness):
        wanted, part = max(1, round(share * len(rows))), list[Place]()
        # The last clusters first, so that the database keeps the samples it had, in order.
        while clusters and len(part) < wanted:
            part = clusters.pop() + part
        parts.append(part)
    if not clusters:
        raise DataError(
            f"policy=search: expected calibration samples without common text for three parts, "
            f"got {len(rows)} samples that don't divide; raise data.calibration.samples"
        )
    return Samples(
        database=_gather(batches, sorted(place for cluster in clusters for place in cluster)),
        fitness=_gather(batches, sorted(parts[1]), tokens),
        held_out=_gather(batches, sorted(parts[0]), tokens),
    )


def _cluster(batches: Sequence[Batch], rows: Sequence[Place]) -> list[list[Place]]:
    """Samples that share a run of tokens, one after another, together; in order of the first."""
    owners: dict[tuple[int, ...], int] = {}
    cluster_of = list(range(len(rows)))

    def find(i: int) -> int:
        while cluster_of[i] != i:
            i = cluster_of[i]
        return i

    for i, (b, row) in enumerate(rows):
        ids = batches[b].get("input_ids")
        if not isinstance(ids, Tensor):
            continue
        tokens = ids[row].tolist()
        for start in range(max(len(tokens) - _RUN + 1, 1)):
            one, other = find(i), find(owners.setdefault(tuple(tokens[start : start + _RUN]), i))
            cluster_of[max(one, other)] = min(one, other)
    clusters: dict[int, list[Place]] = {}
    for i, place in enumerate(rows):
        clusters.setdefault(find(i), []).append(place)
    return list(clusters.values())


def _gather(
    batches: Sequence[Batch], places: Sequence[Place], tokens: int | None = None
) -> list[Batch]:
    """Batches of these samples: as they were batched before, split where they have more tokens."""
    gathered = []
    for b, batch in enumerate(batches):
        rows = [row for number, row in places if number == b]
        length = count_positions(batch)[1]
        size = len(rows) if tokens is None else max(tokens // length, 1)
        for start in range(0, len(rows), max(size, 1)):
            gathered.append(take_rows(batch, rows[start : start + size]))
    return gathered
