"""What was kept, series by series: a kind of group over the layers; groups outside of layers by
name.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Units:
    """Kept and total units of one kind in a layer (`index`), or of one group outside of them
    (None).

    `planned` is the policy's share, scaled as below; None where the report has none.
    """

    index: int | None
    kind: str
    kept: int
    total: int
    planned: float | None = None

    @property
    def share(self) -> float:
        """Kept, in [0, 1]."""
        return self.kept / self.total if self.total else 1.0

    @property
    def removed(self) -> float:
        """Removed, in [0, 1]."""
        return 1 - self.share


def units(report: Mapping[str, Any]) -> list[Units]:
    """Every entry of `layers`.

    A policy's shares count only as proportions, the budget scales them; here they are scaled by the
    median of removed / share, which is that scale wherever no limit cut a group's share short.
    """
    shares = (report.get("policy") or {}).get("shares") or {}
    found = []
    for row in report.get("layers") or []:
        kinds = [kind for kind in row if kind != "index"]
        planned = _planned(shares, row["index"], kinds)
        found += [
            (Units(index=row["index"], kind=kind, **_counts(row[kind])), planned.get(kind))
            for kind in kinds
        ]
    scales = [entry.removed / share for entry, share in found if share]
    scale = statistics.median(scales) if scales else 1.0
    return [
        entry if share is None else Units(**{**entry.__dict__, "planned": min(1.0, scale * share)})
        for entry, share in found
    ]


def _counts(entry: Mapping[str, Any]) -> dict[str, int]:
    return {"kept": entry["kept"], "total": entry["total"]}


def _planned(
    shares: Mapping[str, float], index: int | None, kinds: Sequence[str]
) -> dict[str, float]:
    """Kind → share: a layer's groups and its kinds come in one order; several groups of a kind must
    agree.
    """
    if index is None:
        return {kind: shares[kind] for kind in kinds if kind in shares}
    own = [share for name, share in shares.items() if _layer(name) == index]
    if len(own) == len(kinds):
        return dict(zip(kinds, own, strict=True))
    return dict.fromkeys(kinds, own[0]) if own and len(set(own)) == 1 else {}


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def by_kind(entries: Sequence[Units]) -> dict[str, list[Units]]:
    """Kind → its layers, in order; groups outside of layers are left out."""
    found: dict[str, list[Units]] = {}
    for entry in sorted((e for e in entries if e.index is not None), key=lambda e: e.index or 0):
        found.setdefault(entry.kind, []).append(entry)
    return found


def outside(entries: Sequence[Units]) -> list[Units]:
    """The groups that lie in no layer."""
    return [entry for entry in entries if entry.index is None]
