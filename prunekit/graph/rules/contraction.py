"""Operators that sum weights against activations: products, convolutions, attention, lookups."""

from __future__ import annotations

from prunekit.graph import axes as ax
from prunekit.graph.axes import Axis
from prunekit.graph.operators import Call, Value, operator_rule


@operator_rule("aten.linear")
def _linear(call: Call) -> Value:
    x, weight, bias = call.value("input"), call.value("weight"), call.get("bias")
    call.contract(x, x.axes[-1], weight, weight.axes[1])
    if bias is not None:
        ax.unify(weight.axes[0], bias.axes[0])
    call.multiply_adds(*x.axes, weight.axes[0])
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
    if left.softmax or right.softmax or _mixes_positions(left, right, right_rows):
        for axis in batch:
            ax.tag(axis, "attention")
        ax.tag(right.axes[-1], "head_dim")
        call.note("v_head_dim", right.axes[-1])
    rows = [left.axes[-2]] if len(left.axes) > 1 else []
    columns = [right.axes[-1]] if len(right.axes) > 1 else []
    call.multiply_adds(*batch, *rows, right_rows, *columns)
    return call.make([*batch, *rows, *columns], left, right)


def _mixes_positions(left: Value, right: Value, axis: Axis) -> bool:
    """Whether a product of activations sums over an axis that no weight decides: over positions.

    So linear attention and state-space models do what attention does with softmax probabilities;
    the batch axes of such a product are their heads.
    """
    fixed = ax.axis_size(axis) > 1 and all(atom.pinned for atom in ax.atoms(axis))
    return left.data and right.data and fixed


@operator_rule("aten.addmm", "aten.baddbmm")
def _addmm(call: Call) -> Value:
    out = _product(
        call, call.get("mat1") or call.value("batch1"), call.get("mat2") or call.value("batch2")
    )
    bias = call.value("self")
    merged = call.elementwise(out, bias)
    return call.make(merged.axes)


@operator_rule("aten.einsum")
def _einsum(call: Call) -> Value:
    operands = call.inputs()
    ranks = [len(value.axes) for value in operands]
    terms, output = _read_equation(call.arguments["equation"], ranks)
    seen: dict[str, tuple[Value, Axis]] = {}  # label → its first value and axis
    for labels, value in zip(terms, operands, strict=True):
        for label, axis in zip(labels, value.axes, strict=True):
            if label not in seen or ax.axis_size(axis) == 1:
                seen.setdefault(label, (value, axis))
            elif ax.axis_size(seen[label][1]) == 1:
                seen[label] = (value, axis)
            elif label in output:
                ax.unify(seen[label][1], axis)
            else:
                _contract_label(call, seen[label], (value, axis))
    joined = "".join(terms)
    shared = [label for label in seen if joined.count(label) > 1]
    if len(operands) == 2:
        call.multiply_adds(
            *(axis for label, (_, axis) in seen.items() if label in shared or label in output)
        )
    # All labels but the last of softmax probabilities: batch axes, heads among them.
    weighted = [labels[:-1] for labels, value in zip(terms, operands, strict=True) if value.softmax]
    if len(operands) == 2:
        summed = [axis for label, (_, axis) in seen.items() if label in set(shared) - set(output)]
        left, right = operands
        if any(_mixes_positions(left, right, axis) for axis in summed):
            weighted.append("".join(set(shared) & set(output)))
    for label, (_, axis) in seen.items():
        if label not in shared and label not in output:
            ax.mark_inexact(axis, f"{call.where} sums over it")
        if label in shared and any(label in labels for labels in weighted):
            ax.tag(axis, "attention")
    return call.make([seen[label][1] for label in output])


def _read_equation(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The labels of every operand and of the output.

    Ellipses are spelt out in letters that the equation leaves free; an output that the equation
    doesn't state is stated.
    """
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    named = [len(term.replace("...", "")) for term in terms]
    hidden = max(rank - letters for rank, letters in zip(ranks, named, strict=True))
    spare = "".join(letter for letter in "ZYXWVUTS" if letter not in left)[:hidden]
    terms = [
        # An ellipsis stands for the last of the hidden axes, as many as this operand has.
        term.replace("...", spare[hidden - rank + letters :])
        for term, rank, letters in zip(terms, ranks, named, strict=True)
    ]
    if not arrow:
        joined = "".join(terms)
        return terms, "".join(sorted(letter for letter in joined if joined.count(letter) == 1))
    return terms, output.replace("...", spare)


def _contract_label(call: Call, first: tuple[Value, Axis], second: tuple[Value, Axis]) -> None:
    """Sum over a label that two operands share and the output lacks."""
    (left, left_axis), (right, right_axis) = first, second
    call.contract(left, left_axis, right, right_axis)
    if left.data and right.data and not (left.softmax or right.softmax):
        ax.tag(right_axis, "head_dim")  # what queries and keys are compared over
        call.note("qk_head_dim", right_axis)


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
    batch = [_unify_heads(q, k) for q, k in zip(query.axes[:-2], key.axes[:-2], strict=True)]
    for q, v in zip(batch, value.axes[:-2], strict=True):
        _unify_heads(q, v)
    for axis in batch[1:] if len(batch) > 1 else batch:
        ax.tag(axis, "attention")
    scores = Value(axes=(*batch, query.axes[-2], key.axes[-2]))
    call.multiply_adds(*scores.axes, key.axes[-1])
    call.multiply_adds(*scores.axes, value.axes[-1])
    if (mask := call.get("attn_mask")) is not None:
        call.elementwise(scores, mask)
    return call.make([*batch, query.axes[-2], value.axes[-1]])


def _unify_heads(query: Axis, key: Axis) -> Axis:
    """Unify head axes; with `enable_gqa` a query head is (key head, repeat).

    This is the order of torch's `repeat_interleave`.
    """
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
    routed = call.look_up(weight.axes[0], indices, "looks its rows up (a vocabulary)")
    return call.make_rows(weight, [*indices.axes, weight.axes[1]], routed)


@operator_rule("aten.embedding_bag", "aten._embedding_bag")
def _embedding_bag(call: Call) -> tuple[Value, ...]:
    weight = call.value("weight")
    ax.pin(weight.axes[0], f"{call.where} looks its rows up (a vocabulary)")
    bags = call.make([ax.fresh(call.shape[0], "a bag of rows"), weight.axes[1]])
    return bags, *(
        call.make([ax.fresh(size, "a bag of rows") for size in meta.shape])
        for meta in call.node.meta["val"][1:]
    )


@operator_rule(
    "aten.conv1d",
    "aten.conv2d",
    "aten.conv3d",
    "aten.convolution",
    "aten.conv_transpose1d",
    "aten.conv_transpose2d",
    "aten.conv_transpose3d",
)
def _convolution(call: Call) -> Value:
    """Weight [out, in / groups, …], transposed [in, out / groups, …].

    The groups are an axis of the input and of the output.
    """
    x, weight, bias = call.value("input"), call.value("weight"), call.get("bias")
    transposed = "transpose" in call.operator or call.get("transposed", False)
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
    for axis in x.axes[len(x.axes) - spatial :]:
        ax.pin(axis, f"{call.where} goes along it")
    for quantity, axis in (
        ("groups", outer),
        ("in_channels", outer + into),
        ("out_channels", produced),
    ):
        call.note(quantity, axis)
    space = call.space(spatial)
    kernel = [*(x.axes[len(x.axes) - spatial :] if transposed else space), *weight.axes[2:]]
    call.multiply_adds(*x.axes[: -1 - spatial], outer, into, out, *kernel)
    return call.make([*x.axes[: -1 - spatial], produced, *space])


@operator_rule("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def _recurrent(call: Call) -> tuple[Value, ...]:
    """A recurrent cell: one kernel holds all its weights, so every size stays."""
    reason = f"{call.where} is recurrent: its hidden state feeds itself"
    for value in call.inputs():
        for axis in value.axes:
            ax.pin(axis, reason)
    steps = [axis for value in call.inputs()[:1] for axis in value.axes[:-1]]
    for weight in call.get("params", []):
        if len(weight.axes) > 1:
            call.multiply_adds(*steps, *weight.axes)
    metas = call.node.meta["val"]
    return tuple(call.make([ax.fresh(size, reason) for size in meta.shape]) for meta in metas)
