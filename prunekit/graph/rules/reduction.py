"""Reductions, norms and pools: what mixes the positions of an axis."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from prunekit.graph import axes as ax
from prunekit.graph.axes import Axis
from prunekit.graph.operators import Call, Value, aten, dim_of, operator_rule
from prunekit.graph.rules.elementwise import features

_REDUCTIONS = """
mean sum prod var std amax amin argmax any all max.default min.default norm linalg_vector_norm
logsumexp argmin nansum nanmean
"""
_LARGEST = ("amax", "amin", "max", "min")


@operator_rule(*aten(_REDUCTIONS))
def _reduce(call: Call) -> Value:
    value = call.inputs()[0]
    dims = call.get("dim", list(range(len(value.axes))))
    dims = {dim_of(value, d) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    for dim in dims:
        ax.mark_inexact(value.axes[dim], f"{call.where} reduces over it", weights=not value.data)
    if call.get("keepdim", False):
        out = call.make([() if i in dims else axis for i, axis in enumerate(value.axes)], value)
    else:
        out = call.make([axis for i, axis in enumerate(value.axes) if i not in dims], value)
    free = any(atom.pinned is None for dim in dims for atom in ax.atoms(value.axes[dim]))
    if free and value.data and call.operator.split(".")[1] in _LARGEST:
        ax.tag(features(out), "nonlinear")  # a maxout
    if "argm" not in call.operator:
        return out
    return replace(out, indexes=_reduced(value, dims), counted=())


def _reduced(value: Value, dims: Collection[int]) -> Axis:
    """The product of the axes that an operator reduces over, which its positions are along."""
    return tuple(factor for dim in sorted(dims) for factor in value.axes[dim])


@operator_rule(
    "aten.max.dim",
    "aten.min.dim",
    "aten.var_mean",
    "aten.std_mean",
    "aten.median.dim",
    "aten.aminmax",
)
def _reduce_twice(call: Call) -> tuple[Value, Value]:
    """Values, and for `max`, `min` and `median` the positions that they came from."""
    out = _reduce(call)
    if "mean" in call.operator or "aminmax" in call.operator:
        return out, out
    value = call.value("self")
    along = value.axes[dim_of(value, call.get("dim", 0))]
    return out, replace(out, indexes=along, counted=())


@operator_rule("aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.log_softmax")
def _softmax(call: Call) -> Value:
    value = call.value("self")
    axis = value.axes[dim_of(value, call.arguments["dim"])]
    ax.mark_inexact(axis, f"{call.where} normalises over it", weights=not value.data)
    return call.make(value.axes, value, softmax=True)


@operator_rule("aten.layer_norm", "aten.rms_norm")
def _norm(call: Call) -> Value:
    value = call.value("input")
    rank = len(call.arguments["normalized_shape"])
    for name in ("weight", "bias"):
        if (affine := call.get(name)) is not None:
            for axis, own in zip(value.axes[-rank:], affine.axes, strict=True):
                ax.unify(axis, own)
    for axis in value.axes[-rank:]:
        ax.mark_inexact(axis, f"{call.where} normalises over it", weights=not value.data)
    if rank == 1:
        call.note("normalized_shape", value.axes[-1])
    return call.make(value.axes)


@operator_rule("aten._weight_norm")
def _weight_norm(call: Call) -> Value:
    """The weight g v / ‖v‖, a norm for each position of one dim over all the others.

    Dim −1 is none of them: there is one norm. A position is masked by its g: v = 0 has no norm.
    """
    value, scale = call.value("v"), call.value("g")
    kept, axes = call.get("dim", 0), list(value.axes)
    if kept >= 0:
        ax.unify(value.axes[kept], scale.axes[kept])
        call.normed.append((value.sources, value.axes[kept]))
        axes[kept] = scale.axes[kept]
    for dim, axis in enumerate(value.axes):
        if dim != kept:
            ax.mark_inexact(axis, f"{call.where} normalises over it", weights=True)
    return call.make(axes)


@operator_rule("aten.batch_norm", "aten.instance_norm")
def _batch_norm(call: Call) -> Value:
    """Where the numbers of the call itself are normalised by, these are weights sometimes."""
    value = call.value("input")
    if call.get("training") or call.get("use_input_stats"):
        for axis in value.axes[2:]:
            ax.mark_inexact(axis, f"{call.where} normalises over it", weights=not value.data)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (own := call.get(name)) is not None:
            ax.unify(value.axes[1], own.axes[0])
    call.note("num_features", value.axes[1])
    return call.make(value.axes)


@operator_rule("aten.group_norm")
def _group_norm(call: Call) -> Value:
    """A whole group leaves the others as they are; a channel of each group changes its mean."""
    value, groups = call.value("input"), call.arguments["num_groups"]
    for name in ("weight", "bias"):
        if (own := call.get(name)) is not None:
            ax.unify(value.axes[1], own.axes[0])
    outer, inner = ax.regroup([value.axes[1]], [groups, value.shape[1] // groups])
    ax.mark_inexact(inner, f"{call.where} normalises over it")
    call.note("num_groups", outer)
    call.note("num_channels", value.axes[1])
    return call.make(value.axes)


_LOSSES = """
mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
kl_div soft_margin_loss poisson_nll_loss
"""


@operator_rule(*aten(_LOSSES))
def _loss(call: Call) -> Value:
    """Elementwise, then (reduction 0 is none) a mean or a sum."""
    out = call.elementwise(*call.inputs())
    if call.get("reduction", 1) == 0:
        return out
    for axis in out.axes:
        ax.mark_inexact(axis, f"{call.where} reduces over it")
    return call.make([], out)


@operator_rule("aten.cross_entropy_loss", "aten.nll_loss", "aten.nll_loss_nd", "aten.nll_loss2d")
def _class_loss(call: Call) -> Value:
    value = call.inputs()[0]
    classes = 1 if len(value.axes) > 1 else 0
    ax.pin(value.axes[classes], f"{call.where} looks classes up in it")
    rest = [axis for i, axis in enumerate(value.axes) if i != classes]
    return call.make(rest if call.get("reduction", 1) == 0 else [], value)


_POOLS = [
    f"{kind}_pool{rank}d"
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
    for rank in (1, 2, 3)
]
_UPSAMPLES = """
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_bilinear2d_aa
"""


@operator_rule(
    *aten(" ".join(_POOLS)), *(f"aten.max_pool{rank}d_with_indices" for rank in (1, 2, 3))
)
def _pool(call: Call) -> Any:
    value, rank = call.inputs()[0], int(call.operator.split("_pool")[1][0])
    for axis in value.axes[-rank:]:
        ax.pin(axis, f"{call.where} goes along it")
    out = call.make([*value.axes[:-rank], *call.space(rank)], value)
    return (out, out) if isinstance(call.node.meta["val"], list | tuple) else out


@operator_rule(*aten(_UPSAMPLES))
def _upsample(call: Call) -> Value:
    value = call.inputs()[0]
    for axis in value.axes[2:]:
        ax.pin(axis, f"{call.where} goes along it")
    return call.make([*value.axes[:2], *call.space(len(value.axes) - 2)], value)
