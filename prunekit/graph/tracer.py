"""The tracer: run the operators' rules over a captured forward pass, then read off the groups.

This is the dependency of LLM-Pruner (section 3.1) found by what the tensors do instead of by layer
names; which member triggers the search does not matter, since a group is a class of the union-find.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from prunekit.errors import TraceError, first_line
from prunekit.graph import axes as ax
from prunekit.graph.axes import Axis
from prunekit.graph.capture import WAY_OUT, capture
from prunekit.graph.coupling import CouplingGraph
from prunekit.graph.findings import Findings
from prunekit.graph.operators import Call, Choice, Contraction, Normed, Note, Value, find_rule
from prunekit.graph.reader import read_extents, read_groups, read_products
from prunekit.graph.stacks import Watch, find_stacks
from prunekit.graph.sublayers import SublayerWatch
from prunekit.model.compat import follows_length
from prunekit.model.inputs import without_cache
from prunekit.model.ties import canonical_names, shared_names
from prunekit.model.wrappers import unwrap

_CONSTANT = "it is an axis of a constant"
_INPUT = "it is an axis of the model's input"
_OUTPUT = "it is an axis of the model's output"
_UNUSED = "the forward pass does not use it"
_TORCH_ATTENTION = "torch.nn.MultiheadAttention needs heads × head width equal to its input's width"
_FREQUENCIES = "its rotary frequencies are computed anew for long texts, from the width it had"


def trace(model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...]) -> CouplingGraph:
    """Find the groups of a model from one captured forward pass; no weight is read or copied.

    Args:
        model: any module that `torch.export` can capture; the groups are those of the model inside
            torch's wrappers (DistributedDataParallel, `torch.compile`).
        example_inputs: keyword arguments (a mapping) or positional ones (a tuple) of one forward
            call. Use sizes of two or more, so that no axis looks like a broadcast one.

    Raises:
        TraceError: the forward pass can't be captured, or an operator has no rule (the message says
            how to add one); the weights are sharded, offloaded or quantised.
    """
    model = unwrap(model)
    example_inputs = without_cache(model, example_inputs)
    watch, sublayers = Watch(), SublayerWatch()
    findings = _read(model, example_inputs, watch, sublayers)
    groups = read_groups(model, findings)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, axes in findings.tensors.items():
        if name in findings.buffers:
            shapes[name] = tuple(ax.axis_size(axis) for axis in axes)
    aliases = shared_names(model)
    names = {group.name for group in groups.values()}
    return CouplingGraph(
        groups=tuple(sublayers.complete(model, group) for group in groups.values()),
        shapes=shapes,
        buffers=findings.buffers,
        extents=read_extents(findings, groups),
        products=read_products(findings, groups),
        example_inputs=example_inputs,
        stacks=find_stacks(model, shapes, names, aliases, watch),
        aliases=aliases,
    )


def _read(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    *watches: Watch | SublayerWatch,
) -> Findings:
    """Capture the forward pass, which the watches see, and run the rules over it."""

    def attach(skeleton: nn.Module) -> None:
        for watch in watches:
            watch.attach(skeleton)

    program = capture(model, example_inputs, attach)
    with suppress(TraceError):  # raised by the next line too, with the line of the model's code
        return _Tracer(model).run(program)
    return _Tracer(model).run(capture(model, example_inputs, lines=True))


@dataclass
class _Tracer:
    """Follows the values of one forward pass.

    `used` tells where each tensor is first used. `otherwise` names the parameters that meet
    activations in another way than being summed over against them: a lookup, a sum.
    """

    model: nn.Module
    tensors: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    otherwise: set[str] = field(default_factory=set)
    notes: list[Note] = field(default_factory=list)
    folds: list[Axis] = field(default_factory=list)
    normed: list[Normed] = field(default_factory=list)
    products: list[tuple[Axis, ...]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    def run(self, program: ExportedProgram) -> Findings:
        """Run the rules over the captured graph, and pin all axes that nothing can change."""
        outputs = self._interpret(program.graph_module, self._enter(program))
        for value in _values_in(outputs):
            _pin_all(value.axes, _OUTPUT)
        for name in self.tensors.keys() - self.used.keys():
            _pin_all(self.tensors[name], _UNUSED)
        self._pin_modules(lambda m: isinstance(m, nn.MultiheadAttention), _TORCH_ATTENTION)
        self._pin_modules(follows_length, _FREQUENCIES)
        never = len(program.graph.nodes)
        in_order = sorted(self.tensors, key=lambda name: self.used.get(name, never))
        return Findings(
            tensors={name: self.tensors[name] for name in in_order},
            buffers=frozenset(self.tensors.keys() - dict(self.model.named_parameters()).keys()),
            contractions=tuple(self.contractions),
            otherwise=frozenset(self.otherwise),
            notes=tuple(self.notes),
            folds=tuple(self.folds),
            normed=tuple(self.normed),
            products=tuple(self.products),
            choices=tuple(self.choices),
        )

    def _enter(self, program: ExportedProgram) -> dict[str, Any]:
        """Node name → value of the graph's inputs: parameters, buffers, constants, arguments."""
        canonical = canonical_names(self.model)
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        positions = {node: i for i, node in enumerate(program.graph.nodes)}
        values: dict[str, Any] = {}
        for node in positions:
            if node.op != "placeholder":
                continue
            meta, name = node.meta.get("val"), names.get(node.name)
            if node.name in signature.inputs_to_lifted_tensor_constants:
                values[node.name] = _fix(node.meta["val"], _CONSTANT, data=False)
            elif not isinstance(meta, Tensor):
                values[node.name] = meta
            elif name is None:
                values[node.name] = _fix(meta, _INPUT, data=True)
            else:
                values[node.name] = self._tensor(canonical.get(name, name), node, positions)
        return values

    def _tensor(self, name: str, node: Node, positions: Mapping[Node, int]) -> Value:
        """A parameter or buffer: with the axes it already has, or with fresh ones."""
        if name not in self.tensors:
            self.tensors[name] = tuple(ax.fresh(size) for size in node.meta["val"].shape)
        if node.users:
            first = min(positions[user] for user in node.users)
            self.used[name] = min(first, self.used.get(name, first))
        return Value(axes=self.tensors[name], tainted=True, sources=frozenset([name]))

    def _pin_modules(self, wanted: Callable[[nn.Module], bool], reason: str) -> None:
        """Pin all of some modules, which take a width from something else than their tensors."""
        for path, module in self.model.named_modules():
            if wanted(module):
                prefix = f"{path}." if path else ""
                for name, axes in self.tensors.items():
                    if name.startswith(prefix):
                        _pin_all(axes, reason)

    def _interpret(self, module: GraphModule, values: dict[str, Any]) -> Any:
        """The outputs of a graph, given the values of its inputs; `values` takes all the others."""
        for node in module.graph.nodes:
            if node.op == "get_attr":
                values[node.name] = _attribute(module, str(node.target))
            elif node.op == "call_function":
                values[node.name] = self._call(node, values)
            elif node.op == "output":
                return torch.fx.map_arg(node.args[0], lambda n: values[n.name])
        return None

    def _call(self, node: Node, values: dict[str, Any]) -> Any:
        """The output of one operator."""
        args: Any
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n.name])
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], tuple | list) else args[0]
        for i, region in enumerate(args):
            if isinstance(
                region, GraphModule
            ):  # a higher-order operator around a part of the graph
                names = [n.name for n in region.graph.nodes if n.op == "placeholder"]
                return self._interpret(region, dict(zip(names, args[i + 1 :], strict=False)))
        inputs = _values_in((args, kwargs))
        if not any(value.tainted for value in inputs):
            return _untainted_outputs(node, data=any(value.data for value in inputs))
        return self._apply_rule(node, args, kwargs)

    def _apply_rule(self, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The output of an operator by its rule; what the rule notes is kept."""
        if not hasattr(node.target, "_schema"):
            raise TraceError(_missing_rule(node, f"{node.target}, which is none of ATen's"))
        call = Call(node, {**_bind(node.target, args), **kwargs})
        rule = find_rule(node.target)
        if rule is None:
            if node.meta.get("val") is None:  # an assertion
                return None
            if not any(value.data for value in call.inputs()):
                return call.keep_sizes()  # a weight that is computed from others keeps its sizes
            raise TraceError(_missing_rule(node, call.where))
        try:
            outputs = rule(call)
            _check_shapes(outputs, node)
        except (AssertionError, LookupError, TypeError, ValueError) as error:
            reason = first_line(error) or type(error).__name__
            misfit = f"the rule of operator {call.where} does not fit this call: {reason}"
            raise TraceError(_describe(node, misfit)) from error
        except GuardOnDataDependentSymNode as error:
            unknown = f"operator {call.where} takes numbers from the data, which tracing lacks"
            raise TraceError(f"{unknown}{_find_line(node)}{WAY_OUT}") from error
        self._note_uses(call)
        self.notes.extend(call.notes)
        self.folds.extend(call.folds)
        self.normed.extend(call.normed)
        self.products.extend(call.products)
        self.choices.extend(call.choices)
        return outputs

    def _note_uses(self, call: Call) -> None:
        """Note what a call does with the parameters that meet activations in it."""
        values = call.inputs()
        if not any(value.data for value in values):
            return
        contracted = frozenset[str]().union(*(c.sources for c in call.contractions))
        self.otherwise |= frozenset().union(*(v.sources for v in values)) - contracted
        for contraction in call.contractions:
            dims = (
                (name, dim)
                for name in contraction.sources
                for dim, axis in enumerate(self.tensors[name])
                if axis is contraction.axis
            )
            known = call.node.meta.get("nn_module_stack") and call.module in self._paths
            module = call.module if known else None
            self.contractions.append(replace(contraction, dims=frozenset(dims), module=module))

    @cached_property
    def _paths(self) -> set[str]:
        return {path for path, _ in self.model.named_modules(remove_duplicate=False)}


def _values_in(tree: Any) -> list[Value]:
    """Every `Value` inside nested lists, tuples and dicts."""
    leaves = torch.utils._pytree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, Value))
    return [leaf for leaf in leaves if isinstance(leaf, Value)]


def _pin_all(axes: tuple[Axis, ...], reason: str) -> None:
    for axis in axes:
        ax.pin(axis, reason)


def _untainted_outputs(node: Node, *, data: bool) -> Any:
    """The outputs of an operator that no weight went into: all their sizes are fixed.

    Not so where every position holds the same number, as a recurrent state does at first: a module
    mostly takes such a size from a tensor that it got. Such a state is an activation.
    """
    fills = _fills(node)
    reason, data = None if fills else f"its size is fixed by {node.target}", data or fills

    def fix(output: Any) -> Any:
        return _fix(output, reason, data=data) if isinstance(output, Tensor) else output

    meta = node.meta.get("val")
    return tuple(map(fix, meta)) if isinstance(meta, list | tuple) else fix(meta)


def _fills(node: Node) -> bool:
    """Whether an operator makes a tensor that holds one number everywhere."""
    return str(node.target).split(".")[1:2] in (["zeros"], ["ones"], ["full"])


def _fix(tensor: Tensor, reason: str | None, *, data: bool) -> Value:
    """A tensor of which no axis can change its size, for a reason; without one, any axis can."""
    return Value(axes=tuple(ax.fresh(size, reason) for size in tensor.shape), data=data)


def _attribute(module: GraphModule, path: str) -> Any:
    """The attribute at a dotted path; a tensor as a value."""
    attribute: Any = module
    for part in path.split("."):
        attribute = getattr(attribute, part)
    if isinstance(attribute, Tensor):
        return _fix(attribute, _CONSTANT, data=False)
    return attribute


def _bind(target: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by the names that the operator's schema gives them."""
    arguments = zip(target._schema.arguments, args, strict=False)
    return {argument.name: value for argument, value in arguments}


def _check_shapes(outputs: Any, node: Node) -> None:
    """Raise ValueError where the axes that a rule gives have other sizes than the output has."""
    metas = node.meta.get("val")
    both = zip(
        outputs if isinstance(outputs, list | tuple) else [outputs],
        metas if isinstance(metas, list | tuple) else [metas],
        strict=False,
    )
    for output, meta in both:
        if isinstance(output, Value) and isinstance(meta, Tensor):
            shape = tuple(meta.shape)
            if output.shape != shape:
                raise ValueError(f"its axes make {output.shape}, the output is {shape}")


def _missing_rule(node: Node, where: str) -> str:
    return _describe(node, f"no rule for operator {where}")


def _describe(node: Node, problem: str) -> str:
    """The message about an operator, with the line that called it and a rule that always holds."""
    name = str(node.target).rsplit(".", 1)[-2].split(".")[-1]
    return (
        f"{problem}{_find_line(node)}; register one:\n"
        f'  @prunekit.graph.operator_rule("{node.target}")\n'
        f"  def {name}(call):\n"
        "      return call.keep_sizes()"
        "  # nothing that goes through it is pruned; or, where that is so:\n"
        "      # return call.elementwise(*call.inputs())"
    )


def _find_line(node: Node) -> str:
    """The line of code that called an operator, in brackets; empty where torch did not note it."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    files = [frame for frame in frames if "File" in frame]
    return f" ({files[-1]})" if files else ""
