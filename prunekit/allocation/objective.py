"""The cost that counts, and what it must come down to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.allocation.costs.base import Cost, weights_cost
from prunekit.config import RunConfig
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group


def objective(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    batches: Sequence[Mapping[str, Any]],
    config: RunConfig,
    stored: torch.dtype | None,
) -> tuple[Cost, float]:
    """What counts, and what it must come down to."""
    name = config.target.name
    if name in ("flops", "latency"):
        from prunekit.allocation.costs.flops import flops_cost
        from prunekit.allocation.costs.latency import latency_cost

        if not all(group.multiply_adds_known for group in groups):
            raise ConfigError(
                f"target.{name}: can't be told for whole layers; use target.parameters or ratio"
            )
        example = timing_example(batches[0], config)
        cost = (
            flops_cost(model, graph, example)
            if name == "flops"
            else latency_cost(model, graph, groups, example)
        )
    elif name == "bytes":
        sizes = {n: (stored or p.dtype).itemsize for n, p in model.named_parameters()}
        cost = weights_cost(graph, "bytes", sizes)
    else:
        cost = weights_cost(graph)
    return cost, getattr(config.target, name) if name else cost({}) * (1 - config.ratio)


def timing_example(batch: Mapping[str, Any], config: RunConfig) -> Mapping[str, Any]:
    """What FLOPs and latency are for: `target.batch` rows of `target.tokens` token ids, or any
    other model's batch.
    """
    if not isinstance(ids := batch.get("input_ids"), Tensor) or ids.ndim != 2:
        return batch
    rows, tokens = config.target.batch, config.target.tokens
    repeated = ids[:1].repeat(rows, -(-tokens // ids.shape[1]))[:, :tokens]
    kept = {key: value for key, value in batch.items() if not isinstance(value, Tensor)}
    return {**kept, "input_ids": repeated}
