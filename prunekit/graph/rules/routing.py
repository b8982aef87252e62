"""Routing in mixtures of experts: which are chosen, how often, and each expert's product."""

from __future__ import annotations

from dataclasses import replace

from prunekit.graph import axes as ax
from prunekit.graph.operators import Call, Choice, Value, dim_of, operator_rule, replace_axis


@operator_rule("aten.topk", "aten.sort")
def _sort(call: Call) -> tuple[Value, Value]:
    """Values, and the positions they came from: of `topk` positions among the experts."""
    value = call.value("self")
    dim = dim_of(value, call.get("dim", -1))
    chosen_from = value.axes[dim]
    ax.mark_inexact(chosen_from, f"{call.where} chooses among them")
    if call.operator.startswith("aten.topk"):
        ax.tag(chosen_from, "expert")
        call.choices.append(Choice(axis=chosen_from, count=call.shape[dim]))
    axes = replace_axis(value.axes, dim, ax.fresh(call.shape[dim], "chosen by rank"))
    return replace(call.make(axes, value), indexes=value.indexes), replace(
        call.make(axes, value), indexes=chosen_from, counted=()
    )


@operator_rule("aten.histc", "aten.bincount")
def _counts(call: Call) -> Value:
    """How often each position occurs: an axis of what the numbers index."""
    value = call.value("self")
    (size,) = call.shape
    counted = ax.fresh(size)
    call.look_up(counted, value, "counts")
    return call.make([counted], value)


@operator_rule("aten.one_hot")
def _one_hot(call: Call) -> Value:
    """A last axis of what the numbers index."""
    value = call.value("self")
    classes = ax.fresh(call.shape[-1])
    call.look_up(classes, value, "makes an axis of what they index")
    return call.make([*value.axes, classes], value)


@operator_rule("aten.index_put_", "aten.index_put")
def _index_put(call: Call) -> Value:
    value = call.value("self")
    for axis, index in zip(value.axes, call.arguments["indices"], strict=False):
        if index is not None:
            call.look_up(axis, index, "writes by index")
    return call.make(value.axes)


@operator_rule("transformers.grouped_mm_fallback", "aten._grouped_mm")
def _grouped_product(call: Call) -> Value:
    """Rows [S, K] sorted by group times one matrix [E, K, N] a group: out [S, N]."""
    rows, weight, *ends = call.inputs()
    call.contract(rows, rows.axes[-1], weight, weight.axes[1])
    call.multiply_adds(*rows.axes, weight.axes[2])
    for end in ends[:1]:
        ax.unify(weight.axes[0], end.axes[0])
    return call.make([rows.axes[0], weight.axes[2]])
