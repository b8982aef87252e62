"""One small rule per ATen operator: how its output's axes follow from its inputs'.

A rule takes a `Call` and returns a `Value` (or a tuple of them). It may unify axes, pin them, mark them inexact, and note
a contraction, which makes the weight's axis a consumer. Register one for an operator of your own:

    @prunekit.graph.operator_rule("aten.foo.default")
    def foo(call: Call) -> Value:
        return call.elementwise(call.value("self"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from prunekit.graph import axes as ax
from prunekit.graph.axes import Axis


@dataclass(frozen=True, kw_only=True)
class Value:
    """What is known of a tensor: its axes, and where it comes from.

    `tainted`: a parameter or buffer went into it; `data`: a model input did; `sources`: the parameters of a weight-only
    value; `softmax`: it holds softmax probabilities; `indexes`: its numbers are positions of this axis (routing).
    """

    axes: tuple[Axis, ...]
    tainted: bool = False
    data: bool = False
    sources: frozenset[str] = frozenset()
    softmax: bool = False
    indexes: Axis | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(ax.axis_size(axis) for axis in self.axes)


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """An axis of a weight summed over against activations."""

    sources: frozenset[str]
    axis: Axis
    order: int


@dataclass(frozen=True, kw_only=True)
class Note:
    """A size a module may keep in an attribute: the path of the module, what it is a size of, the axis it counts."""

    module: str
    quantity: str
    axis: Axis


@dataclass
class Call:
    """One operator call: its arguments by schema name, `Value`s in place of tensors."""

    node: Node
    arguments: dict[str, Any]
    contractions: list[Contraction] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def value(self, name: str) -> Value:
        """The tensor argument `name`."""
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument `name`, or the default where it is absent or None."""
        found = self.arguments.get(name)
        return default if found is None else found

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) output."""
        meta = self.node.meta["val"]
        return tuple((meta[0] if isinstance(meta, list | tuple) else meta).shape)

    @property
    def module(self) -> str:
        """Path of the module that made the call."""
        stack = list(self.node.meta.get("nn_module_stack", {}).values())
        return stack[-1][0] if stack else ""

    @property
    def where(self) -> str:
        """The operator and the module that called it, for messages."""
        return f"{self.node.target} in {self.module or 'the model'}"

    def note(self, quantity: str, axis: Axis) -> None:
        """Note that the calling module may keep the size of an axis in an attribute."""
        self.notes.append(Note(module=self.module, quantity=quantity, axis=axis))

    def inputs(self) -> list[Value]:
        """Every tensor argument, those inside lists included."""
        flat = torch.utils._pytree.tree_leaves(self.arguments, is_leaf=lambda x: isinstance(x, Value))
        return [leaf for leaf in flat if isinstance(leaf, Value)]

    def make(self, axes: Sequence[Axis], *inputs: Value, softmax: bool = False) -> Value:
        """The output with these axes, coming from `inputs` (all tensor arguments unless told)."""
        inputs = inputs or tuple(self.inputs())
        data = any(value.data for value in inputs)
        return Value(
            axes=tuple(axes),
            tainted=any(value.tainted for value in inputs),
            data=data,
            sources=frozenset() if data else frozenset().union(*(value.sources for value in inputs)),
            softmax=softmax,
        )

    def elementwise(self, *values: Value) -> Value:
        """Broadcast the values against each other, unifying axes position by position; axes of size 1 aside."""
        rank = max(len(value.axes) for value in values)
        merged: list[Axis] = [()] * rank
        for value in values:
            for i, axis in enumerate(value.axes, start=rank - len(value.axes)):
                if ax.axis_size(axis) == 1:
                    continue
                if ax.axis_size(merged[i]) == 1:
                    merged[i] = axis
                else:
                    ax.unify(merged[i], axis)
        return self.make(merged, *values, softmax=any(value.softmax for value in values))

    def contract(self, left: Value, left_axis: Axis, right: Value, right_axis: Axis) -> None:
        """Sum over two axes against each other; in a weight this makes the axis a consumer."""
        ax.unify(left_axis, right_axis)
        for value, axis in ((left, left_axis), (right, right_axis)):
            if value.sources:
                self.contractions.append(Contraction(sources=value.sources, axis=axis, order=0))


Rule = Callable[[Call], Any]
_RULES: dict[str, Rule] = {}


def operator_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators: "aten.mul.Tensor" for one overload, "aten.mul" for all of them."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def find_rule(target: Any) -> Rule | None:
    """The rule of an operator, its overload's before its family's."""
    name = str(target)
    return _RULES.get(name) or _RULES.get(name.rsplit(".", 1)[0])


def _dim(value: Value, dim: int) -> int:
    return dim % len(value.axes) if value.axes else 0


def _replace(axes: Sequence[Axis], dim: int, *new: Axis) -> list[Axis]:
    return [*axes[:dim], *new, *axes[dim + 1 :]]


# --- elementwise -------------------------------------------------------------------------------------------------------


@operator_rule("aten.mul", "aten.mul_")
def _mul(call: Call) -> Value:
    values = call.inputs()
    out = call.elementwise(*values)
    if sum(value.data and value.tainted for value in values) == 2 and out.axes:
        ax.tag(out.axes[-1], "nonlinear")  # a gate
    return out


@operator_rule(
    "aten.sub", "aten.div", "aten.pow", "aten.maximum", "aten.max.other", "aten.min.other", "aten.minimum", "aten.where", "aten.eq", "aten.ne",
    "aten.lt", "aten.le", "aten.gt", "aten.ge", "aten.__and__", "aten.__or__", "aten.logical_and", "aten.logical_or",
    "aten.bitwise_and", "aten.div_", "aten.sub_", "aten.bitwise_or", "aten.masked_fill", "aten.lerp", "aten.addcmul", "aten.rsub",
    "aten.remainder", "aten.floor_divide", "aten.clamp", "aten.masked_fill_", "aten.fmod", "aten.atan2", "aten.copy_",
    "aten.copy", "aten.addcdiv", "aten.logical_xor", "aten.clamp_min", "aten.clamp_max", "aten.pow_", "aten.true_divide",
    "aten.bitwise_xor", "aten.hypot", "aten.logaddexp", "aten.lerp_", "aten.clamp_", "aten.fmax", "aten.fmin", "aten.xlogy",
)  # fmt: skip
def _elementwise(call: Call) -> Value:
    return call.elementwise(*call.inputs())


@operator_rule("aten.add", "aten.add_")
def _add(call: Call) -> Value:
    values = call.inputs()
    out = call.elementwise(*values)
    if (
        len(values) == 2
        and all(value.data and value.tainted for value in values)
        and values[0].shape == values[1].shape
    ):
        ax.tag(out.axes[-1] if len(out.axes) != 4 else out.axes[1], "residual")
    return out


@operator_rule(
    "aten.to", "aten._to_copy", "aten.type_as", "aten.contiguous", "aten.clone", "aten.detach", "aten.alias", "aten.neg",
    "aten.dropout", "aten.log", "aten.sqrt", "aten.rsqrt", "aten.reciprocal", "aten.lift_fresh_copy", "aten.detach_",
    "aten.float", "aten.bitwise_not", "aten.logical_not", "aten.sign", "aten.nan_to_num", "aten.feature_dropout",
    "aten.alpha_dropout", "aten.log1p", "aten.expm1", "aten.logit", "aten.floor", "aten.ceil", "aten.round", "aten.trunc",
    "aten.frac", "aten.log2", "aten.log10", "aten.isnan", "aten.isinf", "aten.isfinite", "aten.neg_", "aten.zero_",
    "aten.fill_", "aten.feature_dropout_", "aten.bernoulli", "aten.positive", "aten.lift_fresh", "aten.zeros_like",
    "aten.empty_like", "aten.ones_like", "aten.full_like", "aten.dropout_",
)  # fmt: skip
def _unary(call: Call) -> Value:
    first = call.inputs()[0]
    return replace(call.make(first.axes, first, softmax=first.softmax), indexes=first.indexes)


@operator_rule(*(f"aten.{name}{suffix}" for suffix in ("", "_") for name in (
    "silu", "gelu", "relu", "sigmoid", "tanh", "exp", "exp2", "cos", "sin", "tan", "abs", "square", "softplus", "hardtanh",
    "leaky_relu", "elu", "mish", "hardswish", "relu6", "erf", "erfc", "hardsigmoid", "log_sigmoid", "selu", "celu",
    "softshrink", "hardshrink", "threshold", "tanhshrink", "sinh", "cosh", "asin", "acos", "atan", "rrelu",
)))  # fmt: skip
def _activation(call: Call) -> Value:
    out = _unary(call)
    ax.tag(out.axes[-1] if out.axes else (), "nonlinear")
    return out


@operator_rule("aten.prelu")
def _prelu(call: Call) -> Value:
    value, slope = call.value("self"), call.value("weight")
    if slope.shape[0] > 1:
        ax.unify(value.axes[1], slope.axes[0])
        call.note("num_parameters", slope.axes[0])
    return call.make(value.axes)


@operator_rule("aten.glu")
def _glu(call: Call) -> Value:
    value = call.value("self")
    dim = _dim(value, call.get("dim", -1))
    half, gate = ax.cut(value.axes[dim], value.shape[dim] // 2)
    ax.unify(half, gate)
    ax.tag(half, "nonlinear")
    return call.make(_replace(value.axes, dim, half))


@operator_rule("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty")
def _new(call: Call) -> Value:
    return Value(axes=tuple(ax.fresh(size, f"its size is fixed by {call.where}") for size in call.shape))


# --- layout ------------------------------------------------------------------------------------------------------------


@operator_rule(
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.view_as", "aten._reshape_alias",
)  # fmt: skip
def _reshape(call: Call) -> Value:
    first = call.inputs()[0]
    shaped = call.make(ax.regroup(list(first.axes), list(call.shape)), first, softmax=first.softmax)
    return replace(shaped, indexes=first.indexes)


@operator_rule("aten.transpose", "aten.swapaxes", "aten.transpose_")
def _transpose(call: Call) -> Value:
    value = call.value("self")
    axes = list(value.axes)
    i, j = _dim(value, call.arguments.get("dim0", 0)), _dim(value, call.arguments.get("dim1", 0))
    axes[i], axes[j] = axes[j], axes[i]
    return call.make(axes, value, softmax=value.softmax)


@operator_rule("aten.t", "aten.numpy_T", "aten.mT")
def _reverse(call: Call) -> Value:
    value = call.value("self")
    return call.make(value.axes[::-1], value, softmax=value.softmax)


@operator_rule("aten.permute")
def _permute(call: Call) -> Value:
    value = call.value("self")
    return call.make([value.axes[_dim(value, d)] for d in call.arguments["dims"]], value, softmax=value.softmax)


@operator_rule("aten.unsqueeze")
def _unsqueeze(call: Call) -> Value:
    value = call.value("self")
    dim = call.arguments["dim"] % (len(value.axes) + 1)
    return call.make([*value.axes[:dim], (), *value.axes[dim:]], value, softmax=value.softmax)


@operator_rule("aten.squeeze")
def _squeeze(call: Call) -> Value:
    value = call.value("self")
    dims = call.get("dim", list(range(len(value.axes))))
    gone = {_dim(value, d) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    axes = [axis for i, axis in enumerate(value.axes) if i not in gone or ax.axis_size(axis) > 1]
    return call.make(axes, value, softmax=value.softmax)


@operator_rule("aten.expand", "aten.expand_as", "aten.broadcast_to")
def _expand(call: Call) -> Value:
    value, shape = call.value("self"), call.shape
    axes: list[Axis] = [()] * (len(shape) - len(value.axes)) + list(value.axes)
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if ax.axis_size(axis) != size:
            axes[i] = ax.fresh(size)
            ax.tag(axes[i], "broadcast")
    return call.make(axes, value, softmax=value.softmax)


@operator_rule("aten.repeat")
def _repeat(call: Call) -> Value:
    value, repeats = call.value("self"), call.arguments["repeats"]
    axes: list[Axis] = [()] * (len(repeats) - len(value.axes)) + list(value.axes)
    for i, times in enumerate(repeats):
        copies = ax.fresh(times)
        ax.tag(copies, "broadcast")
        axes[i] = copies + axes[i]
    return call.make(axes, value)


@operator_rule("aten.repeat_interleave.self_int")
def _repeat_interleave(call: Call) -> Value:
    value = call.value("self")
    dim = _dim(value, call.arguments["dim"])
    copies = ax.fresh(call.arguments["repeats"])
    ax.tag(copies, "broadcast")
    return call.make(_replace(value.axes, dim, value.axes[dim] + copies), value)


@operator_rule("aten.slice")
def _slice(call: Call) -> Value:
    value = call.value("self")
    dim = _dim(value, call.get("dim", 0))
    axis, size = value.axes[dim], value.shape[dim]
    start, stop, _ = slice(call.get("start"), call.get("end")).indices(size)
    step = call.get("step", 1)
    if step > 1:
        axis = _every(axis, size, start, stop, step, call)
    else:
        axis = _between(axis, start, stop)
    return call.make(_replace(value.axes, dim, axis), value, softmax=value.softmax)


def _between(axis: Axis, start: int, stop: int) -> Axis:
    if stop <= start:
        return ax.fresh(0, "an empty slice")
    if stop < ax.axis_size(axis):
        axis, _ = ax.cut(axis, stop)
    return ax.cut(axis, start)[1] if start else axis


def _every(axis: Axis, size: int, start: int, stop: int, step: int, call: Call) -> Axis:
    """Every step-th position (interleaved rotary): the axis splits into (size / step, step), the inner one is fixed."""
    if size % step == 0 and start < step and stop > size - step + start:
        outer, inner = ax.regroup([axis], [size // step, step])
        ax.pin(inner, f"{call.where} takes every {step}-th position")
        return outer
    ax.pin(axis, f"{call.where} takes every {step}-th position")
    return ax.fresh(len(range(start, stop, step)), "a stepped slice")


@operator_rule("aten.narrow")
def _narrow(call: Call) -> Value:
    value, start = call.value("self"), call.arguments["start"]
    dim = _dim(value, call.arguments["dim"])
    start %= max(value.shape[dim], 1)
    axis = _between(value.axes[dim], start, start + call.arguments["length"])
    return call.make(_replace(value.axes, dim, axis), value, softmax=value.softmax)


@operator_rule("aten.slice_scatter", "aten.select_scatter")
def _scatter(call: Call) -> Value:
    value, source = call.value("self"), call.value("src")
    dim = _dim(value, call.get("dim", 0))
    ax.pin(value.axes[dim], f"{call.where} writes into a part of it")
    others = [axis for i, axis in enumerate(value.axes) if i != dim]
    written = (
        list(source.axes) if len(source.axes) < len(value.axes) else [a for i, a in enumerate(source.axes) if i != dim]
    )
    for axis, own in zip(others, written, strict=True):
        if ax.axis_size(own) == ax.axis_size(axis):
            ax.unify(axis, own)
    return call.make(value.axes)


@operator_rule("aten.pad", "aten.constant_pad_nd")
def _pad(call: Call) -> Value:
    """Constant padding puts fixed positions around an axis; any other mode fixes the axis."""
    value, pad = call.value("self"), call.arguments["pad"]
    axes = list(value.axes)
    for i in range(len(pad) // 2):
        dim, before, after = len(axes) - 1 - i, pad[2 * i], pad[2 * i + 1]
        axis = _between(axes[dim], max(-before, 0), ax.axis_size(axes[dim]) - max(-after, 0))
        reason = f"padded by {call.where}"
        if call.get("mode", "constant") == "constant":
            axes[dim] = ax.concatenate([ax.fresh(n, reason) for n in (before,) if n > 0] + [axis]
                                       + [ax.fresh(n, reason) for n in (after,) if n > 0])  # fmt: skip
        elif before or after:
            ax.pin(axis, reason)
            axes[dim] = ax.fresh(call.shape[dim], reason)
    return call.make(axes, value)


@operator_rule("aten.pixel_shuffle")
def _pixel_shuffle(call: Call) -> Value:
    value, factor = call.value("self"), call.arguments["upscale_factor"]
    channels, inner = ax.regroup([value.axes[-3]], [value.shape[-3] // factor**2, factor**2])
    ax.pin(inner, f"{call.where} turns it into space")
    return call.make([*value.axes[:-3], channels, *(ax.fresh(size, "a spatial axis") for size in call.shape[-2:])])


@operator_rule("aten.tril", "aten.triu")
def _triangle(call: Call) -> Value:
    value = call.value("self")
    for axis in value.axes[-2:]:
        ax.pin(axis, f"{call.where} depends on its positions")
    return call.make(value.axes)


@operator_rule("aten.select")
def _select(call: Call) -> Value:
    value = call.value("self")
    dim = _dim(value, call.arguments["dim"])
    ax.pin(value.axes[dim], f"{call.where} takes one index of it")
    return call.make(_replace(value.axes, dim), value)


@operator_rule("aten.unbind")
def _unbind(call: Call) -> tuple[Value, ...]:
    value = call.value("self")
    dim = _dim(value, call.get("dim", 0))
    ax.pin(value.axes[dim], f"{call.where} takes its indices apart")
    return tuple(call.make(_replace(value.axes, dim), value) for _ in range(value.shape[dim]))


@operator_rule("aten.split", "aten.chunk", "aten.split_with_sizes", "aten.tensor_split")
def _split(call: Call) -> tuple[Value, ...]:
    value = call.value("self")
    dim = _dim(value, call.get("dim", 0))
    rest, outputs = value.axes[dim], []
    sizes = [meta.shape[dim] for meta in call.node.meta["val"]]
    for size in sizes[:-1]:
        head, rest = ax.cut(rest, size)
        outputs.append(head)
    return tuple(call.make(_replace(value.axes, dim, axis), value) for axis in [*outputs, rest])


@operator_rule("aten.cat")
def _cat(call: Call) -> Value:
    values = [value for value in call.inputs() if value.shape != (0,)]
    dim = _dim(values[0], call.get("dim", 0))
    joined = ax.concatenate([value.axes[dim] for value in values])
    for i in range(len(values[0].axes)):
        for value in values[1:]:
            if i != dim:
                ax.unify(values[0].axes[i], value.axes[i])
    return call.make(_replace(values[0].axes, dim, joined), *values)


@operator_rule("aten.stack")
def _stack(call: Call) -> Value:
    values = call.inputs()
    merged = call.elementwise(*values)
    dim = call.get("dim", 0) % (len(merged.axes) + 1)
    place = ax.fresh(len(values), f"stacked by {call.where}")
    return call.make([*merged.axes[:dim], place, *merged.axes[dim:]], *values)


@operator_rule("aten.roll", "aten.flip", "aten.cumsum", "aten.cumprod")
def _shuffle(call: Call) -> Value:
    value = call.value("self")
    dims = call.get("dims", call.get("dim", list(range(len(value.axes)))))
    if str(call.node.target).startswith("aten.cum"):
        return call.make(value.axes, value)  # positions stay where they are; only their numbers depend on one another
    for dim in dims if isinstance(dims, list | tuple) else [dims]:
        ax.pin(value.axes[_dim(value, dim)], f"{call.where} moves its positions")
    return call.make(value.axes, value)


@operator_rule("aten.index.Tensor")
def _index(call: Call) -> Value:
    value, indices = call.value("self"), list(call.arguments["indices"])
    indices += [None] * (len(value.axes) - len(indices))
    at = [i for i, index in enumerate(indices) if index is not None]
    for i in at:
        ax.pin(value.axes[i], f"{call.where} looks its indices up")
    kept = [axis for i, axis in enumerate(value.axes) if i not in at]
    place = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    rank = max(len(indices[i].axes) for i in at)
    looked_up = [ax.fresh(size, "looked up by index") for size in call.shape[place : place + rank]]
    return call.make([*kept[:place], *looked_up, *kept[place:]])


@operator_rule("aten.index_select", "aten.gather", "aten.take_along_dim")
def _pick(call: Call) -> Value:
    value = call.value("self")
    dim = _dim(value, call.get("dim", 0))
    ax.pin(value.axes[dim], f"{call.where} looks its indices up")
    return call.make(_replace(value.axes, dim, ax.fresh(call.shape[dim], "looked up by index")))


# --- contractions ------------------------------------------------------------------------------------------------------


@operator_rule("aten.linear")
def _linear(call: Call) -> Value:
    x, weight, bias = call.value("input"), call.value("weight"), call.get("bias")
    call.contract(x, x.axes[-1], weight, weight.axes[1])
    if bias is not None:
        ax.unify(weight.axes[0], bias.axes[0])
    return call.make([*x.axes[:-1], weight.axes[0]])


@operator_rule("aten.mv", "aten.dot", "aten.vdot", "aten.inner")
def _vector(call: Call) -> Value:
    left = call.value("self")
    right = call.inputs()[1]
    call.contract(left, left.axes[-1], right, right.axes[-1])
    return call.make([*left.axes[:-1], *right.axes[:-1]], left, right)


@operator_rule("aten.outer")
def _outer(call: Call) -> Value:
    left, right = call.inputs()
    return call.make([*left.axes, *right.axes])


@operator_rule("aten.bilinear")
def _bilinear(call: Call) -> Value:
    left, right, weight, *bias = call.inputs()
    call.contract(left, left.axes[-1], weight, weight.axes[1])
    call.contract(right, right.axes[-1], weight, weight.axes[2])
    for own in bias:
        ax.unify(weight.axes[0], own.axes[0])
    for i, quantity in enumerate(("out_features", "in1_features", "in2_features")):
        call.note(quantity, weight.axes[i])
    return call.make([*left.axes[:-1], weight.axes[0]])


@operator_rule("aten.matmul", "aten.mm", "aten.bmm")
def _matmul(call: Call) -> Value:
    left, right = call.value("self"), call.get("other") or call.value("mat2")
    return _product(call, left, right)


def _product(call: Call, left: Value, right: Value) -> Value:
    right_rows = right.axes[-2] if len(right.axes) > 1 else right.axes[0]
    call.contract(left, left.axes[-1], right, right_rows)
    if left.data and right.data and not (left.softmax or right.softmax):
        ax.tag(right_rows, "head_dim")  # scores: what queries and keys are compared over
        call.note("qk_head_dim", right_rows)
    batch = call.elementwise(
        Value(axes=left.axes[:-2], tainted=left.tainted, data=left.data),
        Value(axes=right.axes[:-2], tainted=right.tainted, data=right.data),
    ).axes
    if left.softmax or right.softmax:
        for axis in batch:
            ax.tag(axis, "attention")
        ax.tag(right.axes[-1], "head_dim")
        call.note("v_head_dim", right.axes[-1])
    rows = [left.axes[-2]] if len(left.axes) > 1 else []
    columns = [right.axes[-1]] if len(right.axes) > 1 else []
    return call.make([*batch, *rows, *columns], left, right)


@operator_rule("aten.addmm", "aten.baddbmm")
def _addmm(call: Call) -> Value:
    out = _product(call, call.get("mat1") or call.value("batch1"), call.get("mat2") or call.value("batch2"))
    bias = call.value("self")
    merged = call.elementwise(out, bias)
    return call.make(merged.axes)


@operator_rule("aten.einsum")
def _einsum(call: Call) -> Value:
    operands = call.inputs()
    left, _, output = call.arguments["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = max(len(v.axes) - len(t.replace("...", "")) for t, v in zip(terms, operands, strict=True))
    spare = "".join(c for c in "ZYXWVUTS" if c not in left)[:hidden]  # what an ellipsis stands for
    terms = [t.replace("...", spare[hidden - len(v.axes) + len(t) - 3 :]) for t, v in zip(terms, operands, strict=True)]
    output = output.replace("...", spare)
    if "->" not in call.arguments["equation"]:
        output = "".join(sorted(c for c in set("".join(terms)) if "".join(terms).count(c) == 1))
    seen: dict[str, tuple[Value, Axis]] = {}
    for labels, value in zip(terms, operands, strict=True):
        for label, axis in zip(labels, value.axes, strict=True):
            if label in seen and ax.axis_size(axis) > 1:
                other, other_axis = seen[label]
                if label in output or ax.axis_size(other_axis) == 1:
                    ax.unify(other_axis, axis) if ax.axis_size(other_axis) > 1 else seen.update({label: (value, axis)})
                    continue
                call.contract(other, other_axis, value, axis)
                if other.data and value.data and not (other.softmax or value.softmax):
                    ax.tag(axis, "head_dim")
                    call.note("qk_head_dim", axis)
            else:
                seen.setdefault(label, (value, axis))
    joined = "".join(terms)
    weighted = [labels[:-1] for labels, value in zip(terms, operands, strict=True) if value.softmax]
    for label, (_, axis) in seen.items():
        if joined.count(label) == 1 and label not in output:
            ax.mark_inexact(axis, f"{call.where} sums over it")
        if joined.count(label) > 1 and any(label in labels for labels in weighted):
            ax.tag(axis, "attention")
    return call.make([seen[label][1] for label in output])


@operator_rule("aten.scaled_dot_product_attention")
def _attention(call: Call) -> Value:
    query, key, value = call.value("query"), call.value("key"), call.value("value")
    call.contract(query, query.axes[-1], key, key.axes[-1])
    ax.unify(key.axes[-2], value.axes[-2])
    for axis, quantity in ((key.axes[-1], "qk_head_dim"), (value.axes[-1], "v_head_dim")):
        ax.tag(axis, "head_dim")
        call.note(quantity, axis)
    if call.get("scale") is None:
        ax.mark_inexact(key.axes[-1], f"{call.where} divides by the root of its size")
    batch = [_heads(q, k) for q, k in zip(query.axes[:-2], key.axes[:-2], strict=True)]
    for q, v in zip(batch, value.axes[:-2], strict=True):
        _heads(q, v)
    for axis in batch[1:] if len(batch) > 1 else batch:
        ax.tag(axis, "attention")
    scores = Value(axes=(*batch, query.axes[-2], key.axes[-2]))
    if (mask := call.get("attn_mask")) is not None:
        call.elementwise(scores, mask)
    return call.make([*batch, query.axes[-2], value.axes[-1]])


def _heads(query: Axis, key: Axis) -> Axis:
    """Unify head axes; with `enable_gqa` a query head is (key head, repeat), like torch's repeat_interleave."""
    heads, kv = ax.axis_size(query), ax.axis_size(key)
    if heads != kv and kv:
        repeats = ax.fresh(heads // kv)
        ax.tag(repeats, "broadcast")
        ax.unify(query, key + repeats)
    else:
        ax.unify(query, key)
    return query


@operator_rule("aten.embedding")
def _embedding(call: Call) -> Value:
    weight, indices = call.value("weight"), call.value("indices")
    ax.pin(weight.axes[0], f"{call.where} looks its rows up (a vocabulary)")
    return call.make([*indices.axes, weight.axes[1]])


@operator_rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.conv_transpose1d",
               "aten.conv_transpose2d", "aten.conv_transpose3d")  # fmt: skip
def _convolution(call: Call) -> Value:
    """Weight [out, in / groups, …], transposed [in, out / groups, …]; the groups are an axis of input and output."""
    x, weight, bias = call.value("input"), call.value("weight"), call.get("bias")
    transposed = "transpose" in str(call.node.target) or call.get("transposed", False)
    groups, spatial = call.get("groups", 1), len(weight.axes) - 2
    outer, inner = ax.regroup([weight.axes[0]], [groups, weight.shape[0] // groups])
    into, out = (inner, weight.axes[1]) if transposed else (weight.axes[1], inner)
    x_group, x_inner = ax.regroup([x.axes[-1 - spatial]], [groups, ax.axis_size(into)])
    ax.unify(x_group, outer)
    call.contract(x, x_inner, weight, into)
    produced = ax.resolve(outer + out)
    if bias is not None:
        ax.unify(bias.axes[0], produced)
    for extent in weight.axes[2:]:
        ax.pin(extent, f"it is the extent of a kernel of {call.where}")
    for quantity, axis in (("groups", outer), ("in_channels", outer + into), ("out_channels", produced)):
        call.note(quantity, axis)
    return call.make([*x.axes[: -1 - spatial], produced, *_space(call, spatial)])


def _space(call: Call, rank: int) -> list[Axis]:
    """The last `rank` axes of the output, which no channel decides."""
    return [ax.fresh(size, "a spatial axis") for size in call.shape[len(call.shape) - rank :]]


@operator_rule("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def _recurrent(call: Call) -> tuple[Value, ...]:
    """A recurrent cell: one kernel holds all its weights, so every size stays."""
    reason = f"{call.where} is recurrent: its hidden state feeds itself"
    for value in call.inputs():
        for axis in value.axes:
            ax.pin(axis, reason)
    metas = call.node.meta["val"]
    return tuple(call.make([ax.fresh(size, reason) for size in meta.shape]) for meta in metas)


# --- routing (mixtures of experts) ---------------------------------------------------------------------------------------


@operator_rule("aten.topk", "aten.sort")
def _ranked(call: Call) -> tuple[Value, Value]:
    """Values and the positions they came from: of `topk`, positions of the axis chosen from (the experts)."""
    value = call.value("self")
    dim = _dim(value, call.get("dim", -1))
    chosen_from = value.axes[dim]
    if str(call.node.target).startswith("aten.topk"):
        ax.tag(chosen_from, "expert")
        ax.mark_inexact(chosen_from, f"{call.where} chooses among them")
    axes = _replace(value.axes, dim, ax.fresh(call.shape[dim], "chosen by rank"))
    return replace(call.make(axes, value), indexes=value.indexes), replace(call.make(axes, value), indexes=chosen_from)


@operator_rule("aten.histc", "aten.bincount")
def _counts(call: Call) -> Value:
    """How often each position occurs: an axis of what the numbers index."""
    value = call.value("self")
    (size,) = call.shape
    known = value.indexes is not None and ax.axis_size(value.indexes) == size
    return call.make([value.indexes if known and value.indexes else ax.fresh(size, "counted")], value)


@operator_rule("aten.index_put_", "aten.index_put")
def _index_put(call: Call) -> Value:
    value = call.value("self")
    for axis, index in zip(value.axes, call.arguments["indices"], strict=False):
        if index is not None:
            ax.pin(axis, f"{call.where} writes by index")
    return call.make(value.axes)


@operator_rule("transformers.grouped_mm_fallback", "aten._grouped_mm")
def _grouped_product(call: Call) -> Value:
    """Rows [S, K] sorted by group times one matrix [E, K, N] a group: out [S, N]."""
    rows, weight, *ends = call.inputs()
    call.contract(rows, rows.axes[-1], weight, weight.axes[1])
    for end in ends[:1]:
        ax.unify(weight.axes[0], end.axes[0])
    return call.make([rows.axes[0], weight.axes[2]])


# --- reductions and norms ----------------------------------------------------------------------------------------------


@operator_rule("aten.mean", "aten.sum", "aten.var", "aten.amax", "aten.amin", "aten.std", "aten.argmax", "aten.any", "aten.all",
               "aten.linalg_vector_norm", "aten.norm", "aten.prod", "aten.logsumexp")  # fmt: skip
def _reduce(call: Call) -> Value:
    value = call.inputs()[0]
    dims = call.get("dim", list(range(len(value.axes))))
    dims = {_dim(value, d) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    for dim in dims:
        ax.mark_inexact(value.axes[dim], f"{call.where} reduces over it")
    if call.get("keepdim", False):
        return call.make([() if i in dims else axis for i, axis in enumerate(value.axes)], value)
    return call.make([axis for i, axis in enumerate(value.axes) if i not in dims], value)


@operator_rule("aten.max.dim", "aten.min.dim", "aten.var_mean", "aten.std_mean", "aten.median.dim", "aten.aminmax")
def _reduce_twice(call: Call) -> tuple[Value, Value]:
    out = _reduce(call)
    return out, out


@operator_rule("aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.log_softmax")
def _softmax(call: Call) -> Value:
    value = call.value("self")
    ax.mark_inexact(value.axes[_dim(value, call.arguments["dim"])], f"{call.where} normalises over it")
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
        ax.mark_inexact(axis, f"{call.where} normalises over it")
    if rank == 1:
        call.note("normalized_shape", value.axes[-1])
    return call.make(value.axes)


@operator_rule("aten.batch_norm", "aten.instance_norm")
def _batch_norm(call: Call) -> Value:
    value = call.value("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (own := call.get(name)) is not None:
            ax.unify(value.axes[1], own.axes[0])
    call.note("num_features", value.axes[1])
    return call.make(value.axes)


@operator_rule("aten.group_norm")
def _group_norm(call: Call) -> Value:
    """A whole group leaves the others as they are; a channel inside each group changes the statistics."""
    value, groups = call.value("input"), call.arguments["num_groups"]
    for name in ("weight", "bias"):
        if (own := call.get(name)) is not None:
            ax.unify(value.axes[1], own.axes[0])
    outer, inner = ax.regroup([value.axes[1]], [groups, value.shape[1] // groups])
    ax.mark_inexact(inner, f"{call.where} normalises over it")
    call.note("num_groups", outer)
    call.note("num_channels", value.axes[1])
    return call.make(value.axes)


@operator_rule(*(
    f"aten.{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for rank in (1, 2, 3)
), *(f"aten.max_pool{rank}d_with_indices" for rank in (1, 2, 3)))  # fmt: skip
def _pool(call: Call) -> Any:
    value, rank = call.inputs()[0], int(str(call.node.target).split("_pool")[1][0])
    out = call.make([*value.axes[:-rank], *_space(call, rank)], value)
    return (out, out) if isinstance(call.node.meta["val"], list | tuple) else out


@operator_rule(*(f"aten.upsample_{kind}" for kind in (
    "nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
    "aten._upsample_nearest_exact2d", "aten._upsample_bilinear2d_aa")  # fmt: skip
def _upsample(call: Call) -> Value:
    value = call.inputs()[0]
    return call.make([*value.axes[:2], *_space(call, len(value.axes) - 2)], value)
