"""Taylor importance (LLM-Pruner, section 3.2): how much the loss changes when a unit's weights become zero.

first order, elementwise (Element¹)    Σ_k |g_k w_k|,  g the gradient of the mean loss over the calibration set
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.console import track
from prunekit.errors import DataError
from prunekit.graph import CoupledGroup, CouplingGraph, Member
from prunekit.importance.base import Batch, ScoreImportance, along, by_structure


@dataclass(frozen=True, kw_only=True)
class TaylorFirst(ScoreImportance):
    """Σ_k |g_k w_k| over every member of a unit, biases and norms included."""

    def structures(
        self, model: nn.Module, graph: CouplingGraph, groups: Sequence[CoupledGroup], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One backward pass over the calibration set; the model's own gradients and flags are left as they were."""
        wanted = {member.parameter for group in groups for member in group.members}
        gradients = mean_gradients(model, wanted, batches)

        def positions(member: Member) -> Tensor:
            weight = model.get_parameter(member.parameter).detach()
            return along((gradients[member.parameter] * weight).abs(), member.dim)

        return {group.name: by_structure(graph, group, positions) for group in groups}


def mean_gradients(model: nn.Module, wanted: set[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Gradients of the mean loss over all batches, for the parameters called `wanted`, float32 or better.

    Raises:
        DataError: the model has no loss, or a gradient is not finite.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in wanted}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    totals: dict[str, Tensor] = {}
    weight = 0
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
        for batch in track(batches, "gradients", len(batches)):
            loss, count = summed_loss(model, batch)
            for name, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                g = g.float() if g.dtype in (torch.float16, torch.bfloat16) else g
                totals[name] = totals[name].add_(g) if name in totals else g
            weight += count
    finally:
        model.train(training)
        for p, flag in flags:
            p.requires_grad_(flag)
    for name, total in totals.items():
        if not torch.isfinite(total.div_(weight)).all():
            raise DataError(f"{name}: its gradient holds NaN or infinity")
    return totals


def summed_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The loss summed over what it averages, and how many that are: next tokens (padding excluded), or samples.

    A language model's loss is taken from its logits; any other model must return one (`.loss` or ["loss"]).
    """
    outputs = model(**batch)
    logits, ids = getattr(outputs, "logits", None), batch.get("input_ids")
    if logits is not None and ids is not None and logits.ndim == 3:
        targets = ids[:, 1:].clone()
        if (mask := batch.get("attention_mask")) is not None:
            targets[mask[:, 1:] == 0] = -100
        total = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")
        return total, int((targets != -100).sum())
    loss: Any = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise DataError(f"{type(model).__name__}: Taylor importance needs a model that returns a scalar `loss`")
    count = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
    return loss * count, count
