"""Elementwise operators: axes meet position by position, axes of size 1 aside."""

from __future__ import annotations

from dataclasses import replace

from prunekit.graph import axes as ax
from prunekit.graph.operators import Call, Value, aten, dim_of, operator_rule, replace_axis


@operator_rule("aten.mul", "aten.mul_")
def _mul(call: Call) -> Value:
    values = call.inputs()
    out = call.elementwise(*values)
    whole = [v for v in values if v.data and v.tainted and v.shape == out.shape]
    if len(whole) == 2:  # and not a norm, which multiplies with one number for all features
        ax.tag(features(out), "nonlinear")  # a gate
    return out


def features(value: Value) -> ax.Axis:
    """The axis of an activation's features: the last one, unless positions come last."""
    for axis in value.axes[-1:-3:-1]:
        if any(atom.pinned is None for atom in ax.atoms(axis)):
            return axis
    return ()


_BINARY = """
sub div pow masked_fill lerp clamp copy addcmul remainder floor_divide fmod atan2 addcdiv clamp_min
clamp_max true_divide bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor
eq ne lt le gt ge xlogy hypot complex
"""


@operator_rule(*aten("maximum minimum max.other min.other fmax fmin"))
def _largest(call: Call) -> Value:
    values = call.inputs()
    out = call.elementwise(*values)
    if all(value.data and value.tainted and value.shape == out.shape for value in values):
        ax.tag(features(out), "nonlinear")  # a maxout
    return out


@operator_rule(*aten(_BINARY, in_place=True))
@operator_rule(*aten("where rsub logaddexp polar __and__ __or__"))
def _elementwise(call: Call) -> Value:
    return call.elementwise(*call.inputs())


@operator_rule("aten.broadcast_tensors")
def _broadcast(call: Call) -> list[Value]:
    values = call.inputs()
    return [call.elementwise(*values)] * len(values)


@operator_rule("aten.add", "aten.add_")
def _add(call: Call) -> Value:
    values = call.inputs()
    out = call.elementwise(*values)
    if (
        len(values) == 2
        and all(value.data and value.tainted for value in values)
        and values[0].shape == values[1].shape
    ):
        for axis in (out.axes[-1], out.axes[1]) if len(out.axes) == 4 else out.axes[-1:]:
            ax.tag(axis, "residual")
    return out


_PLAIN = """
neg sqrt rsqrt reciprocal log log1p log2 log10 expm1 logit sign floor ceil round trunc frac
nan_to_num positive dropout feature_dropout alpha_dropout detach zero fill bitwise_not logical_not
"""
_COPIES = """
to _to_copy type_as float contiguous clone alias lift_fresh lift_fresh_copy isnan isinf isfinite
zeros_like ones_like empty_like full_like bernoulli
conj _conj conj_physical resolve_conj resolve_neg real imag angle
"""
_ACTIVATIONS = """
silu gelu relu relu6 leaky_relu elu selu celu mish sigmoid hardsigmoid log_sigmoid tanh hardtanh
softplus hardswish softshrink hardshrink tanhshrink threshold rrelu exp exp2 erf erfc abs square
sin cos tan asin acos atan sinh cosh
"""


@operator_rule(*aten(_PLAIN, in_place=True))
@operator_rule(*aten(_COPIES))
def _unary(call: Call) -> Value:
    first = call.inputs()[0]
    return replace(call.make(first.axes, first, softmax=first.softmax), indexes=first.indexes)


@operator_rule(*aten(_ACTIVATIONS, in_place=True))
def _activation(call: Call) -> Value:
    out = _unary(call)
    ax.tag(features(out), "nonlinear")
    return out


@operator_rule("aten.prelu")
def _prelu(call: Call) -> Value:
    value, slope = call.value("self"), call.value("weight")
    if slope.shape[0] > 1:
        ax.unify(value.axes[1], slope.axes[0])
        call.note("num_parameters", slope.axes[0])
    ax.tag(features(value), "nonlinear")
    return call.make(value.axes)


@operator_rule("aten.glu")
def _glu(call: Call) -> Value:
    value = call.value("self")
    dim = dim_of(value, call.get("dim", -1))
    half, gate = ax.cut(value.axes[dim], value.shape[dim] // 2)
    ax.unify(half, gate)
    ax.tag(half, "nonlinear")
    return call.make(replace_axis(value.axes, dim, half))


@operator_rule("aten.new_empty")
def _blank(call: Call) -> Value:
    """A tensor that is yet to be written: what is copied into its slices says what they are."""
    return Value(axes=tuple(ax.fresh(size) for size in call.shape), tainted=True, data=True)


@operator_rule("aten.new_zeros", "aten.new_ones", "aten.new_full")
def _new(call: Call) -> Value:
    """One number everywhere: the tensor may have any size, if the module asks for that size."""
    return Value(axes=tuple(ax.fresh(size) for size in call.shape))
