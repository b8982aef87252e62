"""The register of rules, and the view of an operator's call that a rule is given.

A rule says how the axes of an operator's output follow from those of its inputs. It takes a `Call`
and returns a `Value` (or a tuple of them). It may unify axes, pin them, and mark them inexact. It
may note a contraction, which makes the axis of a weight a consumer, and the multiply-adds that the
operator takes. Register a rule for an operator of your own:

    @prunekit.graph.operator_rule("aten.foo.default")
    def foo(call: Call) -> Value:
        return call.elementwise(call.value("self"))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from prunekit.graph import axes as ax
from prunekit.graph.axes import Axis
from prunekit.graph.groups import ParameterDim

# How torch.export may name an entry of a part of a list, `layers[1:3][0]`: slice(1, 3, None).0
_SLICED = re.compile(r"\bslice\((None|\d+), [^()]*, (None|\d+)\)\.(\d+)")


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor of the forward pass: its axes, and where its numbers come from.

    `tainted`: they depend on a parameter or buffer. `data`: they depend on an input of the model.
    `sources`: the parameters of a value that depends on weights alone. `softmax`: they are softmax
    probabilities. `indexes`: they are positions along this axis (routing). `counted`: axes whose
    positions whole numbers were computed from, in a way that is not followed.
    """

    axes: tuple[Axis, ...]
    tainted: bool = False
    data: bool = False
    sources: frozenset[str] = frozenset()
    softmax: bool = False
    indexes: Axis | None = None
    counted: tuple[Axis, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(ax.axis_size(axis) for axis in self.axes)


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """An axis that weights (`sources`, by name) are summed over against activations.

    `dims`: the dims of these weights that the axis is, where the weights are used as they are
    stored; empty where that is not known. `module`: the path of the module that sums; None where
    that is not known.
    """

    sources: frozenset[str]
    axis: Axis
    dims: frozenset[ParameterDim] = frozenset()
    module: str | None = None


@dataclass(frozen=True, kw_only=True)
class Note:
    """A size that a module may keep in an attribute.

    `module` is its path, `quantity` what the size is called, `axis` the axis that has this size.
    """

    module: str
    quantity: str
    axis: Axis


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The `count` best positions of an axis are chosen for each token, as a router does."""

    axis: Axis
    count: int


Normed = tuple[frozenset[str], Axis]  # names of parameters, and the axis of them meant


@dataclass
class Call:
    """One operator call: its arguments by schema name, `Value`s in place of tensors."""

    node: Node
    arguments: dict[str, Any]
    contractions: list[Contraction] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    folds: list[Axis] = field(default_factory=list)
    normed: list[Normed] = field(default_factory=list)
    products: list[tuple[Axis, ...]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    def value(self, name: str) -> Value:
        """The tensor argument `name`."""
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument `name`, or the default where it is absent or None."""
        value = self.arguments.get(name)
        return default if value is None else value

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) output."""
        meta = self.node.meta["val"]
        return tuple((meta[0] if isinstance(meta, list | tuple) else meta).shape)

    @property
    def operator(self) -> str:
        """The usual name of the operator: "aten.mul.Tensor" for "aten.multiply.Tensor" too."""
        return usual_name(str(self.node.target))

    @property
    def module(self) -> str:
        """Path of the module that made the call."""
        stack = list(self.node.meta.get("nn_module_stack", {}).values())
        return _SLICED.sub(_place_in_list, stack[-1][0]) if stack else ""

    @property
    def where(self) -> str:
        """The operator and the module that called it, for messages."""
        return f"{self.node.target} in {self.module or 'the model'}"

    def note(self, quantity: str, axis: Axis) -> None:
        """Note that the calling module may keep the size of an axis in an attribute.

        The quantity is empty where the operator doesn't tell what the size means.
        """
        self.notes.append(Note(module=self.module, quantity=quantity, axis=axis))

    def multiply_adds(self, *axes: Axis) -> None:
        """Note multiply-adds: as many as the product of these axes has positions."""
        self.products.append(axes)

    def inputs(self) -> list[Value]:
        """Every tensor argument, those inside lists included."""
        flat = torch.utils._pytree.tree_leaves(
            self.arguments, is_leaf=lambda x: isinstance(x, Value)
        )
        return [leaf for leaf in flat if isinstance(leaf, Value)]

    def space(self, rank: int) -> list[Axis]:
        """Fresh axes for the last `rank` dims of the output, whose sizes depend on no channel."""
        return [ax.fresh(size, "a spatial axis") for size in self.shape[len(self.shape) - rank :]]

    def make(self, axes: Sequence[Axis], *inputs: Value, softmax: bool = False) -> Value:
        """The output with these axes, coming from `inputs` (all tensor arguments unless told)."""
        inputs = inputs or tuple(self.inputs())
        data = any(value.data for value in inputs)
        return Value(
            axes=tuple(axes),
            tainted=any(value.tainted for value in inputs),
            data=data,
            sources=frozenset()
            if data
            else frozenset().union(*(value.sources for value in inputs)),
            softmax=softmax,
            counted=self._counted(inputs),
        )

    def _counted(self, inputs: Sequence[Value]) -> tuple[Axis, ...]:
        """The axes whose positions the output's whole numbers are computed from."""
        meta = self.node.meta["val"]
        first = meta[0] if isinstance(meta, list | tuple) else meta
        if first.is_floating_point() or first.is_complex():
            return ()
        axes = [axis for v in inputs for axis in (*v.counted, v.indexes) if axis is not None]
        return tuple(dict.fromkeys(axes))

    def keep_sizes(self) -> Any:
        """The outputs of an operator of which nothing is known: all sizes in and out are kept."""
        for value in self.inputs():
            for axis in value.axes:
                ax.pin(axis, f"{self.where} has no rule")
        reason = f"its size is fixed by {self.where}"

        def fix(output: Any) -> Any:
            if not isinstance(output, torch.Tensor):
                return output
            return self.make([ax.fresh(size, reason) for size in output.shape])

        meta = self.node.meta["val"]
        return tuple(map(fix, meta)) if isinstance(meta, list | tuple) else fix(meta)

    def look_up(self, axis: Axis, index: Value, what: str) -> bool:
        """Note that `index` holds positions along an axis; return whether it is known whose.

        Whatever is indexed by the same routing is one axis. Where that is not known for sure, both
        the axis and what the numbers were computed from must keep their sizes.
        """
        known = index.indexes
        if known is not None and ax.axis_size(known) == ax.axis_size(axis):
            ax.unify(axis, known)
            ax.tag(axis, "expert")
            return True
        for fixed in (axis, *index.counted, *([known] if known is not None else [])):
            ax.pin(fixed, f"{self.where} {what}")
        return False

    def make_rows(self, table: Value, axes: Sequence[Axis], routed: bool) -> Value:
        """What is looked up in a table: weights again, where they are those of tokens' experts."""
        rows = self.make(axes)
        if routed and table.sources:
            return replace(rows, data=False, sources=table.sources)
        return rows

    def elementwise(self, *values: Value) -> Value:
        """Broadcast values against each other: axes of more than one position are unified."""
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
        """Sum over two axes against each other.

        Against activations this makes the axis of a weight a consumer.
        """
        ax.unify(left_axis, right_axis)
        if not left.data and not right.data:
            self.folds.append(left_axis)
            return
        for value, axis in ((left, left_axis), (right, right_axis)):
            if value.sources:
                self.contractions.append(Contraction(sources=value.sources, axis=axis))


Rule = Callable[[Call], Any]
_RULES: dict[str, Rule] = {}


def operator_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule: under "aten.mul.Tensor" for one overload, under "aten.mul" for them all."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def aten(names: str, in_place: bool = False) -> list[str]:
    """Full names of space-separated ATen operators.

    `in_place`: their in-place forms follow the same rule, and are named too.
    """
    return [
        f"aten.{name}{suffix}"
        for name in names.split()
        for suffix in (("", "_") if in_place else ("",))
    ]


# Other names of operators that take the same arguments.
_ALIASES = {
    **{"multiply": "mul", "subtract": "sub", "divide": "div", "negative": "neg", "absolute": "abs"},
    **{"greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le"},
    **{"not_equal": "ne", "clip": "clamp", "fix": "trunc", "expit": "sigmoid", "ger": "outer"},
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "tan2")},
    **{"concat": "cat", "concatenate": "cat", "reshape_as": "view_as", "ravel": "flatten"},
    **{"swapdims": "swapaxes", "moveaxis": "movedim", "adjoint": "mT", "mH": "mT"},
    **{"linalg_matmul": "matmul", "linalg_norm": "norm", "frobenius_norm": "norm"},
    **{"unsafe_split": "split", "unsafe_chunk": "chunk"},
    **{"unsafe_split_with_sizes": "split_with_sizes"},
}


def usual_name(name: str) -> str:
    """The name of the operator that this one is another name of; else the name itself."""
    family, _, overload = name.removeprefix("aten.").rpartition(".")
    if not name.startswith("aten.") or family.startswith("_"):
        return name
    stem = family.removeprefix("special_").rstrip("_")
    in_place = "_" * family.endswith("_")
    stem = _ALIASES.get(stem, stem.removesuffix("_copy"))
    return f"aten.{stem}{in_place}.{overload}"


def find_rule(target: Any) -> Rule | None:
    """The rule of an operator, its overload's before its family's, its own before its alias's."""
    names = [str(target), usual_name(str(target))]
    keys = [key for name in names for key in (name, name.rsplit(".", 1)[0])]
    return next((_RULES[key] for key in keys if key in _RULES), None)


def dim_of(value: Value, dim: int) -> int:
    """A dim counted from the front; 0 of a scalar."""
    return dim % len(value.axes) if value.axes else 0


def replace_axis(axes: Sequence[Axis], dim: int, *new: Axis) -> list[Axis]:
    """The axes with the one at `dim` replaced by others, or by none."""
    return [*axes[:dim], *new, *axes[dim + 1 :]]


def _place_in_list(entry: re.Match[str]) -> str:
    """The place in the whole list of an entry that is named by a part of it."""
    start, step, place = (None if part == "None" else int(part) for part in entry.groups())
    assert place is not None
    return str((start or 0) + (step or 1) * place)
