"""LoRAPrune's gradients (Zhang et al. 2023, arXiv 2305.18403): ∂L/∂W estimated from an adapter's,
the weights frozen.

With y = x Wᵀ + (x Aᵀ) Bᵀ and B = 0:   ∂L/∂W ≈ ∇B A + B ∇A − ∇B ∇A = ∇B A,   ∇B = Σ_t δ_t (A x_t)ᵀ,
δ = ∂L/∂y (B = 0 also leaves y and makes ∇A = 0). Since ∇B A = (∂L/∂W) AᵀA, the estimate is unbiased
where E[AᵀA] = I: A is √(n/r) times r orthonormal rows in R^n, drawn uniformly; with r = n it is
exact.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import mean_loss
from prunekit.calibration.gradients.state import recomputing
from prunekit.calibration.gradients.taps import is_stock, is_transposed, tap
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError, DataError
from prunekit.graph import CouplingGraph, Group, Member
from prunekit.importance.base import ScoreImportance
from prunekit.importance.structures import sum_by_structure
from prunekit.model.ties import Place, tensor_places
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed
from prunekit.runtime.numbers import along, at_least_float32


@dataclass(frozen=True, kw_only=True)
class LoraGradient(ScoreImportance):
    """Σ_k |ĝ_k w_k|^p over the matrices of linear modules; other parameters don't count.

    `rank` of the adapters; `p` = 1, or 2 as in LoRAPrune; `checkpointing`: recompute layers in the
    backward pass instead of keeping their activations. Gradients take the adapters' memory, never
    the weights'.
    """

    rank: int = 8
    p: int = 1
    seed: int = 0
    checkpointing: bool = False

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
            name: self._adapter(model, name, places[name])
            for name in names
            if _adaptable(places[name])
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

    def _adapter(self, model: nn.Module, name: str, places: Sequence[Place]) -> "_Adapter":
        weight = model.get_parameter(name).detach()
        modules = list(dict.fromkeys(place.module for place in places))
        transposed = is_transposed(modules[0])
        outputs, inputs = weight.T.shape if transposed else weight.shape
        down = _directions(name, self.seed, min(self.rank, inputs), inputs).to(weight)
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
        """Add a batch's ∇B = Σ_t δ_t (A x_t)ᵀ, weighted with its targets."""
        gradient = delta.flatten(0, -2).T @ kept.flatten(0, -2)
        self.up.add_(gradient, alpha=count())

    def estimate(self) -> Tensor:
        """∇B A, of the weight's shape."""
        down = self.down.to(self.up)
        return down.T @ self.up.T if self.transposed else self.up @ down


def _adaptable(places: Sequence[Place]) -> bool:
    """Whether stock linear modules alone hold a parameter, as their weight."""
    kinds = {
        is_transposed(module)
        for module, attribute, _ in places
        if attribute == "weight" and is_stock(module)
    }
    return len(kinds) == 1 and all(
        attribute == "weight" and is_stock(module) for module, attribute, _ in places
    )


def _directions(name: str, seed: int, rank: int, size: int) -> Tensor:
    """√(size/rank) × `rank` orthonormal rows in R^size [rank, size], float64: E[AᵀA] = I."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    basis = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
    return basis.T * math.sqrt(size / rank)


def _accumulate(
    model: nn.Module,
    adapters: Mapping[str, _Adapter],
    batches: Sequence[Batch],
    checkpointing: bool,
) -> None:
    """∇B of the mean loss over the calibration set, into the adapters."""
    total, count = 0, 0
    with undisturbed(model), ExitStack() as stack:
        for adapter in adapters.values():
            for module in adapter.modules:
                stack.callback(
                    tap(module, adapter.project, partial(adapter.receive, lambda: count)).remove
                )
        stack.enter_context(recomputing(model, checkpointing))
        for batch in track(batches, "gradients", len(batches)):
            loss = mean_loss(model, batch)
            count = sum(loss.counts)
            total += count
            if count and loss.value.requires_grad:
                loss.value.backward()
    if not total:
        raise DataError("calibration: it holds not a single token to predict")
    for name, adapter in adapters.items():
        if not torch.isfinite(adapter.up.div_(total)).all():
            raise DataError(f"{name}: its gradient holds NaN or infinity")
