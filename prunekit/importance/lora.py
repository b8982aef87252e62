"""Gradients of adapters instead of weights (LoRAPrune, Zhang et al. 2023, arXiv 2305.18403).

∂L/∂W is estimated from the gradients of a LoRA adapter, with the weights frozen. With
y = x Wᵀ + (x Aᵀ) Bᵀ and B = 0:

    ∂L/∂W ≈ ∇B A + B ∇A − ∇B ∇A = ∇B A,    ∇B = Σ_t δ_t (A x_t)ᵀ,    δ = ∂L/∂y,

for B = 0 leaves y as it is and makes ∇A = 0. Since ∇B A = (∂L/∂W) AᵀA, the estimate is unbiased
where E[AᵀA] = I: A is √(n/r) times r orthonormal rows in R^n, drawn uniformly. With r = n it is
exact.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import mean_loss
from prunekit.calibration.gradients.state import recomputing, should_recompute
from prunekit.calibration.gradients.taps import tap
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError, DataError
from prunekit.graph import CouplingGraph, Group, Member
from prunekit.importance.base import ScoreImportance
from prunekit.importance.structures import sum_by_structure
from prunekit.model.linear import is_stock
from prunekit.model.ties import Place, tensor_places
from prunekit.model.updates import is_transposed
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed
from prunekit.runtime.numbers import along, at_least_float32, first_false
from prunekit.runtime.seeds import make_generator


@dataclass(frozen=True, kw_only=True)
class LoraGradient(ScoreImportance):
    """I_u = Σ_{k ∈ u} |ĝ_k w_k|^p over the weights of linear modules; other parameters don't count.

    The gradients take the memory of the adapters, never that of the weights.

    Args:
        rank: r of the adapters.
        p: 1, or 2 as in LoRAPrune.
        seed: of the directions A.
        checkpointing: recompute layers in the backward pass instead of keeping their activations.
            None: where memory is short.
    """

    rank: int = 8
    p: int = 1
    seed: int = 0
    checkpointing: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigError(f"importance.rank: expected a positive number, got {self.rank}")
        if self.p not in (1, 2):
            raise ConfigError(f"importance.p: expected 1 or 2, got {self.p}")

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One backward pass a batch, for the adapters alone; the model is left as it was."""
        names = dict.fromkeys(m.parameter for group in groups for m in group.scored_members(graph))
        places = tensor_places(model)
        adapters = {
            name: self._make_adapter(model, name, places[name])
            for name in names
            if _takes_adapter(places[name])
        }
        for group in groups:
            if not any(member.parameter in adapters for member in group.scored_members(graph)):
                raise ConfigError(
                    f"{group.name}: lora_gradient scores linear modules' weights, and it has none"
                )
        _accumulate(model, adapters, batches, self.checkpointing)

        def positions(member: Member) -> Tensor | None:
            if (adapter := adapters.get(member.parameter)) is None:
                return None
            weight = model.get_parameter(member.parameter).detach()
            return along(adapter.estimate().mul_(weight).abs_().pow_(self.p), member.dim)

        return {group.name: sum_by_structure(graph, group, positions) for group in groups}

    def _make_adapter(self, model: nn.Module, name: str, places: Sequence[Place]) -> "_Adapter":
        weight = model.get_parameter(name).detach()
        modules = list(dict.fromkeys(place.module for place in places))
        transposed = is_transposed(modules[0])
        outputs, inputs = weight.T.shape if transposed else weight.shape
        down = _draw_directions(name, self.seed, min(self.rank, inputs), inputs).to(weight)
        up = torch.zeros(
            outputs, len(down), device=weight.device, dtype=at_least_float32(weight[:0]).dtype
        )
        return _Adapter(modules=modules, transposed=transposed, down=down, up=up)


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    """A = `down` [r, in], ∇B = `up` [out, r], of the modules that share one weight."""

    modules: Sequence[nn.Module]
    transposed: bool
    down: Tensor
    up: Tensor

    def project(self, x: Tensor) -> Tensor:
        """A x: [..., in] → [..., r]."""
        return x @ self.down.T

    def receive(self, count: Callable[[], int], kept: Tensor, delta: Tensor) -> None:
        """Add ∇B = Σ_t δ_t (A x_t)ᵀ of a batch, weighted with how many targets it has."""
        gradient = delta.flatten(0, -2).T @ kept.flatten(0, -2)
        self.up.add_(gradient, alpha=count())

    def estimate(self) -> Tensor:
        """∇B A, of the shape of the weight."""
        down = self.down.to(self.up)
        return down.T @ self.up.T if self.transposed else self.up @ down


def _takes_adapter(places: Sequence[Place]) -> bool:
    """Whether stock linear modules alone hold a parameter, as their weight."""
    kinds = {
        is_transposed(module)
        for module, attribute, _ in places
        if attribute == "weight" and is_stock(module)
    }
    return len(kinds) == 1 and all(
        attribute == "weight" and is_stock(module) for module, attribute, _ in places
    )


def _draw_directions(name: str, seed: int, rank: int, size: int) -> Tensor:
    """√(size/rank) × `rank` orthonormal rows in R^size [rank, size], float64: E[AᵀA] = I."""
    drawn = torch.randn(size, rank, generator=make_generator(seed, name), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T * math.sqrt(size / rank)


def _accumulate(
    model: nn.Module,
    adapters: Mapping[str, _Adapter],
    batches: Sequence[Batch],
    checkpointing: bool | None,
) -> None:
    """Leave ∇B of the mean loss over the calibration set in the adapters.

    Raises:
        DataError: no token to predict; a gradient that holds NaN or infinity.
    """
    total, count = 0, 0

    def targets_now() -> int:
        return count  # of the batch whose backward pass runs

    with undisturbed(model), ExitStack() as taps:
        for adapter in adapters.values():
            receive = partial(adapter.receive, targets_now)
            for module in adapter.modules:
                taps.callback(tap(module, adapter.project, receive).remove)
        if checkpointing is None:
            checkpointing = should_recompute(model, batches)
        taps.enter_context(recomputing(model, checkpointing))
        for batch in track(batches, "gradients", len(batches)):
            loss = mean_loss(model, batch)
            count = sum(loss.counts)
            total += count
            if count and loss.value.requires_grad:
                loss.value.backward()
    if not total:
        raise DataError("calibration: it holds not a single token to predict")
    finite = {
        name: torch.isfinite(adapter.up.div_(total)).all() for name, adapter in adapters.items()
    }
    if (name := first_false(finite)) is not None:
        raise DataError(f"{name}: its gradient holds NaN or infinity")
