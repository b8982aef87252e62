"""Operators that move positions about: reshapes, slices, joins, padding, indexing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prunekit.graph import axes as ax
from prunekit.graph.axes import Axis
from prunekit.graph.operators import Call, Value, aten, dim_of, operator_rule, replace_axis


@operator_rule(*aten("view reshape _unsafe_view flatten unflatten view_as _reshape_alias"))
def _reshape(call: Call) -> Value:
    first = call.inputs()[0]
    axes = ax.regroup(list(first.axes), list(call.shape))
    for axis in axes:
        call.note("", axis)
    shaped = call.make(axes, first, softmax=first.softmax)
    return replace(shaped, indexes=first.indexes)


@operator_rule("aten.transpose", "aten.swapaxes", "aten.transpose_", "aten.swapaxes_")
def _transpose(call: Call) -> Value:
    value = call.value("self")
    axes = list(value.axes)
    i, j = (
        dim_of(value, call.arguments.get("dim0", 0)),
        dim_of(value, call.arguments.get("dim1", 0)),
    )
    axes[i], axes[j] = axes[j], axes[i]
    return call.make(axes, value, softmax=value.softmax)


@operator_rule("aten.mT")
def _transpose_matrices(call: Call) -> Value:
    value = call.value("self")
    return call.make([*value.axes[:-2], *value.axes[:-3:-1]], value, softmax=value.softmax)


@operator_rule("aten.t", "aten.numpy_T")
def _reverse(call: Call) -> Value:
    value = call.value("self")
    return call.make(value.axes[::-1], value, softmax=value.softmax)


@operator_rule("aten.permute")
def _permute(call: Call) -> Value:
    value = call.value("self")
    return call.make(
        [value.axes[dim_of(value, d)] for d in call.arguments["dims"]], value, softmax=value.softmax
    )


@operator_rule("aten.unsqueeze")
def _unsqueeze(call: Call) -> Value:
    value = call.value("self")
    dim = call.arguments["dim"] % (len(value.axes) + 1)
    out = call.make([*value.axes[:dim], (), *value.axes[dim:]], value, softmax=value.softmax)
    return replace(out, indexes=value.indexes)


@operator_rule("aten.squeeze")
def _squeeze(call: Call) -> Value:
    value = call.value("self")
    dims = call.get("dim", list(range(len(value.axes))))
    gone = {dim_of(value, d) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    axes = [axis for i, axis in enumerate(value.axes) if i not in gone or ax.axis_size(axis) > 1]
    return replace(call.make(axes, value, softmax=value.softmax), indexes=value.indexes)


@operator_rule("aten.expand", "aten.expand_as", "aten.broadcast_to")
def _expand(call: Call) -> Value:
    value, shape = call.value("self"), call.shape
    axes: list[Axis] = [()] * (len(shape) - len(value.axes)) + list(value.axes)
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if ax.axis_size(axis) != size:
            axes[i] = ax.fresh(size)
            ax.tag(axes[i], "broadcast")
    return call.make(axes, value, softmax=value.softmax)


@operator_rule("aten.repeat", "aten.tile")
def _repeat(call: Call) -> Value:
    value, repeats = call.value("self"), call.arguments.get("repeats") or call.arguments["dims"]
    repeats = [1] * (len(value.axes) - len(repeats)) + list(repeats)  # tile may leave out the first
    axes: list[Axis] = [()] * (len(repeats) - len(value.axes)) + list(value.axes)
    for i, times in enumerate(repeats):
        copies = ax.fresh(times)
        ax.tag(copies, "broadcast")
        axes[i] = copies + axes[i]
    return call.make(axes, value)


@operator_rule("aten.repeat_interleave.self_int")
def _repeat_interleave(call: Call) -> Value:
    value = call.value("self")
    dim = dim_of(value, call.arguments["dim"])
    copies = ax.fresh(call.arguments["repeats"])
    ax.tag(copies, "broadcast")
    return call.make(replace_axis(value.axes, dim, value.axes[dim] + copies), value)


@operator_rule("aten.slice")
def _slice(call: Call) -> Value:
    value = call.value("self")
    dim = dim_of(value, call.get("dim", 0))
    axis, size = value.axes[dim], value.shape[dim]
    start, stop, _ = slice(call.get("start"), call.get("end")).indices(size)
    step = call.get("step", 1)
    if step > 1:
        axis = _take_every(axis, size, start, stop, step, call)
    else:
        axis = _take_range(axis, start, stop)
    return call.make(replace_axis(value.axes, dim, axis), value, softmax=value.softmax)


def _take_range(axis: Axis, start: int, stop: int) -> Axis:
    """The positions from start to stop of an axis."""
    if stop <= start:
        return ax.fresh(0, "an empty slice")
    if stop < ax.axis_size(axis):
        axis, _ = ax.cut(axis, stop)
    return ax.cut(axis, start)[1] if start else axis


def _take_every(axis: Axis, size: int, start: int, stop: int, step: int, call: Call) -> Axis:
    """Every step-th position (interleaved rotary).

    The axis splits into (size / step, step), and the inner axis is fixed.
    """
    if size % step == 0 and start < step and stop > size - step + start:
        outer, inner = ax.regroup([axis], [size // step, step])
        ax.pin(inner, f"{call.where} takes every {step}-th position")
        return outer
    ax.pin(axis, f"{call.where} takes every {step}-th position")
    return ax.fresh(len(range(start, stop, step)), "a stepped slice")


@operator_rule("aten.narrow")
def _narrow(call: Call) -> Value:
    value, start = call.value("self"), call.arguments["start"]
    dim = dim_of(value, call.arguments["dim"])
    start %= max(value.shape[dim], 1)
    axis = _take_range(value.axes[dim], start, start + call.arguments["length"])
    return call.make(replace_axis(value.axes, dim, axis), value, softmax=value.softmax)


@operator_rule("aten.slice_scatter", "aten.select_scatter")
def _scatter(call: Call) -> Value:
    value, source = call.value("self"), call.value("src")
    dim = dim_of(value, call.get("dim", 0))
    ax.pin(value.axes[dim], f"{call.where} writes into a part of it")
    others = [axis for i, axis in enumerate(value.axes) if i != dim]
    written = (
        list(source.axes)
        if len(source.axes) < len(value.axes)
        else [a for i, a in enumerate(source.axes) if i != dim]
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
        axis = _take_range(axes[dim], max(-before, 0), ax.axis_size(axes[dim]) - max(-after, 0))
        reason = f"padded by {call.where}"
        if call.get("mode", "constant") == "constant":
            axes[dim] = ax.concatenate(
                [ax.fresh(n, reason) for n in (before,) if n > 0]
                + [axis]
                + [ax.fresh(n, reason) for n in (after,) if n > 0]
            )
        elif before or after:
            ax.pin(axis, reason)
            axes[dim] = ax.fresh(call.shape[dim], reason)
    return call.make(axes, value)


@operator_rule("aten.view_as_complex")
def _view_as_complex(call: Call) -> Value:
    value = call.value("self")
    ax.pin(value.axes[-1], f"{call.where} makes one number of the two")
    return call.make(value.axes[:-1], value)


@operator_rule("aten.view_as_real")
def _view_as_real(call: Call) -> Value:
    value = call.value("self")
    return call.make([*value.axes, ax.fresh(2, f"{call.where} makes two numbers of one")], value)


@operator_rule("aten.unfold")
def _unfold(call: Call) -> Value:
    """Windows along a dim: their number takes its place, their positions come last."""
    value = call.value("self")
    dim = dim_of(value, call.arguments["dimension"])
    reason = f"{call.where} goes along it"
    ax.pin(value.axes[dim], reason)
    windows, inner = ax.fresh(call.shape[dim], reason), ax.fresh(call.shape[-1], reason)
    return call.make([*replace_axis(value.axes, dim, windows), inner], value)


@operator_rule(
    *aten("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"),
    *aten("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn"),
)
def _fourier(call: Call) -> Value:
    """A Fourier transform mixes the positions of the axes that it goes along."""
    value = call.value("self")
    every = list(range(len(value.axes)))
    last = {"2": every[-2:], "n": every}.get(call.operator.split(".")[1][-1], every[-1:])
    dims = call.get("dim", last)
    along = {dim_of(value, d) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    reason = f"{call.where} goes along it"
    for dim in along:
        ax.pin(value.axes[dim], reason)
    sizes = zip(value.axes, call.shape, strict=True)
    axes = (ax.fresh(size, reason) if i in along else a for i, (a, size) in enumerate(sizes))
    return call.make(list(axes), value)


@operator_rule("aten.im2col")
def _im2col(call: Call) -> Value:
    """Patches of an image [..., C, H, W]: [..., C · patch, patches]."""
    value = call.value("self")
    reason = f"{call.where} goes along it"
    for axis in value.axes[-2:]:
        ax.pin(axis, reason)
    patch = ax.fresh(call.shape[-2] // value.shape[-3], reason)
    patches = ax.fresh(call.shape[-1], reason)
    return call.make([*value.axes[:-3], value.axes[-3] + patch, patches], value)


@operator_rule("aten.pixel_shuffle")
def _pixel_shuffle(call: Call) -> Value:
    value, factor = call.value("self"), call.arguments["upscale_factor"]
    channels, inner = ax.regroup([value.axes[-3]], [value.shape[-3] // factor**2, factor**2])
    ax.pin(inner, f"{call.where} turns it into space")
    return call.make(
        [
            *value.axes[:-3],
            channels,
            *(ax.fresh(size, "a spatial axis") for size in call.shape[-2:]),
        ]
    )


@operator_rule("aten.tril", "aten.triu")
def _triangle(call: Call) -> Value:
    value = call.value("self")
    for axis in value.axes[-2:]:
        ax.pin(axis, f"{call.where} depends on its positions")
    return call.make(value.axes)


@operator_rule("aten.select")
def _select(call: Call) -> Value:
    value = call.value("self")
    dim = dim_of(value, call.arguments["dim"])
    ax.pin(value.axes[dim], f"{call.where} takes one index of it")
    return call.make(replace_axis(value.axes, dim), value)


@operator_rule("aten.unbind")
def _unbind(call: Call) -> tuple[Value, ...]:
    value = call.value("self")
    dim = dim_of(value, call.get("dim", 0))
    ax.pin(value.axes[dim], f"{call.where} takes its indices apart")
    return tuple(call.make(replace_axis(value.axes, dim), value) for _ in range(value.shape[dim]))


@operator_rule("aten.split", "aten.chunk", "aten.split_with_sizes", "aten.tensor_split")
def _split(call: Call) -> tuple[Value, ...]:
    value = call.value("self")
    dim = dim_of(value, call.get("dim", 0))
    rest, outputs = value.axes[dim], []
    sizes = [meta.shape[dim] for meta in call.node.meta["val"]]
    for size in filter(None, sizes[: _last_filled(sizes)]):
        head, rest = ax.cut(rest, size)
        outputs.append(head)
    outputs.append(rest)
    for place, size in enumerate(sizes):
        if not size:
            outputs.insert(place, ax.fresh(0, f"{call.where} leaves nothing in it"))
    by_number = call.operator in (
        "aten.chunk.default",
        "aten.split.Tensor",
        "aten.tensor_split.sections",
    )
    for part in outputs:
        call.note("", part)
    for part in outputs[1:] if by_number and len(set(sizes)) == 1 else ():
        ax.unify(outputs[0], part)  # one number: equal parts, which must stay equal
    return tuple(
        call.make(replace_axis(value.axes, dim, ax.resolve(axis)), value) for axis in outputs
    )


def _last_filled(sizes: list[int]) -> int:
    """The place of the last part that is not empty."""
    return max((place for place, size in enumerate(sizes) if size), default=0)


@operator_rule("aten.cat")
def _cat(call: Call) -> Value:
    values = [value for value in call.inputs() if value.shape != (0,)]
    dim = dim_of(values[0], call.get("dim", 0))
    values = [value for value in values if value.shape[dim]] or values[:1]
    joined = ax.concatenate([value.axes[dim] for value in values])
    for i in range(len(values[0].axes)):
        for value in values[1:]:
            if i != dim:
                ax.unify(values[0].axes[i], value.axes[i])
    return _point_alike(call.make(replace_axis(values[0].axes, dim, joined), *values), values)


def _point_alike(out: Value, parts: Sequence[Value]) -> Value:
    """Note that what is joined of numbers that point into one axis points into this axis too."""
    pointed = {ax.resolve(part.indexes) for part in parts if part.indexes is not None}
    if len(pointed) != 1 or any(part.indexes is None for part in parts):
        return out
    return replace(out, indexes=pointed.pop(), counted=())


@operator_rule("aten.stack")
def _stack(call: Call) -> Value:
    values = call.inputs()
    merged = call.elementwise(*values)
    dim = call.get("dim", 0) % (len(merged.axes) + 1)
    place = ax.fresh(len(values), f"stacked by {call.where}")
    stacked = call.make([*merged.axes[:dim], place, *merged.axes[dim:]], *values)
    return _point_alike(stacked, values)


@operator_rule("aten.roll", "aten.flip", "aten.cumsum", "aten.cumprod")
def _shuffle(call: Call) -> Value:
    value = call.value("self")
    dims = call.get("dims", call.get("dim", list(range(len(value.axes)))))
    if call.operator.startswith("aten.cum"):
        for dim in dims if isinstance(dims, list | tuple) else [dims]:
            ax.mark_inexact(
                value.axes[dim_of(value, dim)], f"{call.where} adds them up one after another"
            )
        return call.make(
            value.axes, value
        )  # positions stay where they are; only their numbers depend on one another
    for dim in dims if isinstance(dims, list | tuple) else [dims]:
        ax.pin(value.axes[dim_of(value, dim)], f"{call.where} moves its positions")
    return call.make(value.axes, value)


@operator_rule("aten.index.Tensor")
def _index(call: Call) -> Value:
    value, indices = call.value("self"), list(call.arguments["indices"])
    indices += [None] * (len(value.axes) - len(indices))
    at = [i for i, index in enumerate(indices) if index is not None]
    routed = [call.look_up(value.axes[i], indices[i], "looks its indices up") for i in at]
    kept = [axis for i, axis in enumerate(value.axes) if i not in at]
    place = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    rank = max(len(indices[i].axes) for i in at)
    looked_up = [ax.fresh(size, "looked up by index") for size in call.shape[place : place + rank]]
    return call.make_rows(value, [*kept[:place], *looked_up, *kept[place:]], all(routed))


@operator_rule("aten.movedim")
def _movedim(call: Call) -> Value:
    value = call.value("self")
    places = [call.arguments[name] for name in ("source", "destination")]
    source, target = (
        [dim_of(value, d) for d in (p if isinstance(p, list | tuple) else [p])] for p in places
    )
    rest = iter(axis for i, axis in enumerate(value.axes) if i not in source)
    moved = {to: value.axes[at] for at, to in zip(source, target, strict=True)}
    return call.make(
        [moved[i] if i in moved else next(rest) for i in range(len(value.axes))], value
    )


@operator_rule(*aten("scatter scatter_add index_add index_fill masked_scatter", in_place=True))
def _write(call: Call) -> Value:
    value, index = call.value("self"), call.get("index") or call.get("mask")
    call.look_up(value.axes[dim_of(value, call.get("dim", 0))], index, "writes by index")
    source = call.get("source")
    if call.get("mask") and source and source.shape[-1] == value.shape[-1]:
        ax.unify(value.axes[-1], source.axes[-1])  # whole rows are written, of image features say
    return call.make(value.axes)


@operator_rule("aten.index_select", "aten.gather", "aten.take_along_dim")
def _pick(call: Call) -> Value:
    value = call.value("self")
    dim = dim_of(value, call.get("dim", 0))
    index = call.get("index") or call.value("indices")
    routed = call.look_up(value.axes[dim], index, "looks its indices up")
    looked_up = ax.fresh(call.shape[dim], "looked up by index")
    return call.make_rows(value, replace_axis(value.axes, dim, looked_up), routed)
