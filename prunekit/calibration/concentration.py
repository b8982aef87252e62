"""How much of a Hessian a few tokens own: the trace of H = Σ_t x_t x_tᵀ is Σ_t ‖x_t‖².

In trained models a few tokens have activations hundreds of times as large as all others' (massive
activations, Sun et al. 2024, arXiv 2402.17762).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.calibration.consumers import Consumer, find_consumers, watching
from prunekit.calibration.padding import remove_padding
from prunekit.calibration.weigher import lone
from prunekit.data.batches import Batch, copy_batch, count_positions
from prunekit.graph import Group
from prunekit.runtime.modes import undisturbed
from prunekit.runtime.numbers import at_least_float32

_SHOWN = 5  # positions


@dataclass(frozen=True, kw_only=True)
class Concentration:
    """The share of Σ_t ‖x_t‖² of a consumer's inputs that its largest tokens own.

    `permille`, `percent`: of the largest 0.1 % and 1 % of the tokens, at least one token.
    `positions`: where the largest 0.1 % are in their samples, as position → how many of them; the
    five positions that most of them have.
    """

    permille: float
    percent: float
    positions: Mapping[int, int]


@torch.no_grad()
def measure_concentration(
    model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]
) -> dict[str, Concentration]:
    """Group → the concentration of its consumer's inputs, in one forward pass; no padding counts.

    Groups without a single matrix that reads them are left out. Every process measures all batches.
    """
    consumers = lone({group.name: find_consumers(model, group) for group in groups})
    squares: dict[str, list[Tensor]] = {name: [] for name in consumers}
    places: list[Tensor] = []
    names = {consumer: name for name, consumer in consumers.items()}

    def note(consumer: Consumer, inputs: Tensor) -> None:
        squares[names[consumer]].append(at_least_float32(inputs).square().sum(-1).flatten())

    with undisturbed(model), watching(list(names), note):
        for batch in remove_padding(model, batches):
            rows, length = count_positions(batch)
            places.append(torch.arange(length).repeat(rows))
            model(**copy_batch(batch))
    place = torch.cat(places)
    whole = {name: torch.cat(own) for name, own in squares.items() if own}
    return {
        name: _concentrate(own.cpu(), place)
        for name, own in whole.items()
        if len(own) == len(place)  # tokens that were regrouped have lost their places
    }


def _concentrate(squares: Tensor, place: Tensor) -> Concentration:
    """From ‖x‖² [tokens] and the position [tokens] of each token in its sample."""
    order = squares.argsort(descending=True, stable=True)
    total = squares.sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)

    def share(count: int) -> float:
        return float(squares[order[:count]].sum(dtype=torch.float64) / total)

    permille, percent = (max(1, round(len(squares) / part)) for part in (1000, 100))
    positions = Counter(place[order[:permille]].tolist()).most_common(_SHOWN)
    return Concentration(
        permille=share(permille), percent=share(percent), positions=dict(positions)
    )
