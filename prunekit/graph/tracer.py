"""Coupled groups: run the operator rules over a captured graph and read the prunable dimensions off
the axes.

This is the dependency of LLM-Pruner (section 3.1) found by what the tensors do instead of by layer
names; which member triggers the search does not matter, since a group is a class of the union-find.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from prunekit.errors import TraceError
from prunekit.graph import axes as ax
from prunekit.graph.axes import DIAGONAL, Atom, Axis
from prunekit.graph.capture import capture
from prunekit.graph.coupling import CouplingGraph, Extent, Product
from prunekit.graph.groups import CoupledGroup, Kind, Member
from prunekit.graph.operators import Call, Contraction, Note, Value, find_rule
from prunekit.graph.stacks import Watch, find_stacks
from prunekit.model.inputs import without_cache
from prunekit.model.ties import shared_names

_RANK = ("attention", "mlp", "expert", "query_head", "head_dim", "channel", "other")


def trace(model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...]) -> CouplingGraph:
    """Find the coupled groups of a model from one captured forward pass; no weight is read or
    copied.

    Args:
        model: any module that `torch.export` can capture.
        example_inputs: keyword arguments (a mapping) or positional ones (a tuple) of one forward
            call. Use sizes of two or more, so that no axis looks like a broadcast one.

    Raises:
        TraceError: the forward pass can't be captured, or an operator has no rule (the message says
            how to add one).
    """
    example_inputs = without_cache(model, example_inputs)
    watch = Watch()
    program = capture(model, example_inputs, watch.attach)
    graph = _Tracer(model).run(program)
    aliases = shared_names(model)
    stacks = find_stacks(model, graph.shapes, graph.by_name, aliases, watch)
    return replace(
        graph,
        example_inputs=example_inputs,
        stacks=stacks,
        aliases=aliases,
    )


@dataclass
class _Tracer:
    model: nn.Module
    tensors: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    folds: list[Axis] = field(default_factory=list)
    products: list[tuple[Axis, ...]] = field(default_factory=list)
    used: dict[str, int] = field(
        default_factory=dict
    )  # parameter → where in the graph it is first used

    def run(self, program: torch.export.ExportedProgram) -> CouplingGraph:
        canonical = _canonical_names(self.model)
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        values: dict[str, Any] = {}
        positions = {node: i for i, node in enumerate(program.graph.nodes)}
        for node in positions:
            if (
                node.op == "placeholder"
                and node.name in signature.inputs_to_lifted_tensor_constants
            ):
                values[node.name] = _fixed(
                    node.meta["val"], "it is an axis of a constant", data=False
                )
            elif node.op == "placeholder":
                values[node.name] = self._input(
                    node, canonical.get(names.get(node.name, ""), names.get(node.name)), positions
                )
        outputs = self._interpret(program.graph_module, values)
        for value in _values(outputs):
            for axis in value.axes:
                ax.pin(axis, "it is an axis of the model's output")
        for name in self.tensors.keys() - self.used.keys():
            for axis in self.tensors[name]:
                ax.pin(axis, "the forward pass does not use it")
        self._pin_fixed_modules()
        self.tensors = dict(
            sorted(self.tensors.items(), key=lambda item: self.used.get(item[0], len(positions)))
        )
        buffers = frozenset(self.tensors.keys() - dict(self.model.named_parameters()).keys())
        reader = _Reader(
            self.model,
            self.tensors,
            buffers,
            self.contractions,
            self.notes,
            self.folds,
            self.products,
        )
        groups, extents, products = reader.read()
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        shapes |= {
            name: tuple(ax.axis_size(axis) for axis in self.tensors[name]) for name in buffers
        }
        return CouplingGraph(
            groups=groups, shapes=shapes, buffers=buffers, extents=extents, products=products
        )

    def _pin_fixed_modules(self) -> None:
        """Torch's own attention takes the width of its heads from its input's: neither can go
        alone.
        """
        for path, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                for name, axes in self.tensors.items():
                    for axis in axes if name.startswith(f"{path}." if path else "") else ():
                        ax.pin(
                            axis,
                            "torch.nn.MultiheadAttention needs heads × head width equal to its input's width",
                        )

    def _input(self, node: Node, name: str | None, positions: Mapping[Node, int]) -> Any:
        meta = node.meta.get("val")
        if not isinstance(meta, Tensor):
            return meta
        if name is None:
            return _fixed(meta, "it is an axis of the model's input", data=True)
        if name not in self.tensors:
            self.tensors[name] = tuple(ax.fresh(size) for size in meta.shape)
        if node.users:
            first = min(positions[user] for user in node.users)
            self.used[name] = min(first, self.used.get(name, first))
        return Value(axes=self.tensors[name], tainted=True, sources=frozenset([name]))

    def _interpret(self, module: GraphModule, values: dict[str, Any]) -> Any:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                values[node.name] = _attribute(module, node.target)
            elif node.op == "call_function":
                values[node.name] = self._call(node, values)
            elif node.op == "output":
                return torch.fx.map_arg(node.args[0], lambda n: values[n.name])
        return None

    def _call(self, node: Node, values: dict[str, Any]) -> Any:
        args: Any
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n.name])
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], tuple | list) else args[0]
        inner = next((i for i, arg in enumerate(args) if isinstance(arg, GraphModule)), None)
        if inner is not None:  # a higher-order operator around a region of the graph
            region: Any = args[inner]
            names = [n.name for n in region.graph.nodes if n.op == "placeholder"]
            return self._interpret(region, dict(zip(names, args[inner + 1 :], strict=False)))
        inputs = _values((args, kwargs))
        if not any(value.tainted for value in inputs):
            return _untainted(node, data=any(value.data for value in inputs))
        rule = find_rule(node.target)
        if not hasattr(node.target, "_schema"):
            raise TraceError(_missing_rule(node, f"{node.target}, which is none of ATen's"))
        call = Call(node, {**_bind(node.target, args), **kwargs})
        if rule is None:
            if node.meta.get("val") is None:  # an assertion
                return None
            raise TraceError(_missing_rule(node, call.where))
        result = rule(call)
        self.notes.extend(call.notes)
        self.folds.extend(call.folds)
        self.products.extend(call.products)
        for contraction in call.contractions:
            self.contractions.append(
                Contraction(
                    sources=contraction.sources, axis=contraction.axis, order=len(self.contractions)
                )
            )
        return result


def _values(tree: Any) -> list[Value]:
    leaves = torch.utils._pytree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, Value))
    return [leaf for leaf in leaves if isinstance(leaf, Value)]


def _untainted(node: Node, *, data: bool) -> Any:
    """The outputs of an operator that no weight went into: all sizes are fixed."""
    meta = node.meta.get("val")

    def fixed(tensor: Any) -> Any:
        return (
            _fixed(tensor, f"its size is fixed by {node.target}", data=data)
            if isinstance(tensor, Tensor)
            else tensor
        )

    return tuple(map(fixed, meta)) if isinstance(meta, list | tuple) else fixed(meta)


def _fixed(tensor: Tensor, reason: str, *, data: bool) -> Value:
    return Value(axes=tuple(ax.fresh(size, reason) for size in tensor.shape), data=data)


def _attribute(module: GraphModule, target: Any) -> Any:
    found: Any = module
    for part in str(target).split("."):
        found = getattr(found, part)
    return (
        _fixed(found, "it is an axis of a constant", data=False)
        if isinstance(found, Tensor)
        else found
    )


def _bind(target: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    return {
        argument.name: arg for argument, arg in zip(target._schema.arguments, args, strict=False)
    }


def _missing_rule(node: Node, where: str) -> str:
    line = next(
        (
            s.strip()
            for s in reversed((node.meta.get("stack_trace") or "").splitlines())
            if "File" in s
        ),
        "",
    )
    name = str(node.target).rsplit(".", 1)[-2].split(".")[-1]
    return (
        f"no rule for operator {where}{f' ({line})' if line else ''}; register one:\n"
        f'  @prunekit.graph.operator_rule("{node.target}")\n'
        f"  def {name}(call):\n"
        f"      return call.elementwise(*call.inputs())  # how its output's axes follow from its inputs'"
    )


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a tied parameter → the one `named_parameters` lists."""
    names: dict[int, str] = {}
    pairs = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: names.setdefault(id(tensor), name) for name, tensor in pairs}


@dataclass
class _Reader:
    """Turns the axes of the parameters into groups."""

    model: nn.Module
    tensors: dict[str, tuple[Axis, ...]]
    buffers: frozenset[str]
    contractions: list[Contraction]
    notes: list[Note]
    folds: list[Axis]
    products: list[tuple[Axis, ...]]

    def read(self) -> tuple[tuple[CoupledGroup, ...], tuple[Extent, ...], tuple[Product, ...]]:
        """The groups in order of execution, the sizes modules may keep of them, and the products
        they take part in.
        """
        places: dict[Atom, list[tuple[str, int]]] = defaultdict(list)
        for name, axes in self.tensors.items():
            for dim, axis in enumerate(axes):
                for atom in dict.fromkeys(ax.atoms(axis)):
                    places[atom].append((name, dim))
        consumed = self._consumed()
        for atom in (atom for axis in self.folds for atom in ax.atoms(axis)):
            if any(
                (name, atom) in consumed for name, _ in places[atom]
            ):  # not the rank of a product of two weights
                atom.inexact = atom.inexact or "weights are summed over it, for a scale"
        attention = {atom for atom in places if "attention" in atom.tags}
        beside = {
            a
            for n, d in {p for atom in attention for p in places[atom]}
            for a in ax.atoms(self.tensors[n][d])
        }
        drafts = []
        for atom, where in places.items():
            if any(name not in self.buffers for name, _ in where) and atom.size > 1:
                drafts.append(self._draft(atom, where, consumed, attention, beside))
        drafts.sort(key=lambda draft: (draft["order"], _RANK.index(draft["kind"])))
        names = {draft.pop("atom"): name for draft, name in zip(drafts, _name(drafts), strict=True)}
        groups = (
            CoupledGroup(name=name, **d) for name, d in zip(names.values(), drafts, strict=True)
        )
        return tuple(groups), tuple(self._extents(names)), tuple(self._multiply_adds(names))

    def _multiply_adds(self, names: dict[Atom, str]) -> Iterator[Product]:
        counts = Counter[tuple[Atom, ...]]()
        for axes in self.products:
            counts.update(ax.monomials(axes, names))
        for atoms, count in counts.items():
            yield Product(count=count, units=tuple(names[atom] for atom in atoms))

    def _extents(self, names: dict[Atom, str]) -> Iterator[Extent]:
        for note in self.notes:
            owned = {}
            for atom in dict.fromkeys(ax.atoms(note.axis)):
                if atom in names and (owners := ax.owners(note.axis, atom))[0] != DIAGONAL:
                    owned[names[atom]] = _table(owners, atom.size)
            yield Extent(
                module=note.module,
                quantity=note.quantity,
                size=ax.axis_size(note.axis),
                owned=owned,
            )

    def _consumed(self) -> dict[tuple[str, Atom], int]:
        """(parameter, atom) → when it was last contracted with activations."""
        found: dict[tuple[str, Atom], int] = {}
        for contraction in self.contractions:
            for atom in ax.atoms(contraction.axis):
                for name in contraction.sources:
                    found[name, atom] = contraction.order
        return found

    def _draft(
        self, atom: Atom, where: list, consumed: dict, attention: set[Atom], beside: set[Atom]
    ) -> dict[str, Any]:
        members, reason = [], atom.pinned
        for name, dim in where:
            owners = ax.owners(self.tensors[name][dim], atom)
            counts = torch.bincount(owners[owners >= 0], minlength=atom.size)
            if owners[0] == DIAGONAL or len(counts.unique()) != 1:
                reason = reason or f"its units own uneven parts of {name}"
                continue
            index = _table(owners, atom.size)
            role: Literal["producer", "consumer"] = (
                "consumer"
                if (name, atom) in consumed and self._is_consumed(name, dim, atom)
                else "producer"
            )
            members.append(Member(parameter=name, dim=dim, role=role, index=index))
        module, layer, short = self._place([name for name, _ in where if name not in self.buffers])
        kind = self._kind(atom, where, attention, beside, layer)
        cost = sum(self._numel_of_unit(m, atom) for m in members if m.parameter not in self.buffers)
        return {
            "atom": atom,
            "short": short,
            "kind": kind,
            "layer": layer,
            "module": module,
            "num_units": atom.size,
            "members": tuple(members),
            "prunable": reason is None,
            "exact": reason is None and atom.inexact is None,
            "reason": reason or atom.inexact,
            "parameters_per_unit": cost,
            "order": max(
                (consumed[m.parameter, atom] for m in members if m.role == "consumer"), default=-1
            ),
        }

    def _is_consumed(self, name: str, dim: int, atom: Atom) -> bool:
        """Whether this dim of the parameter (it may hold the atom in another one too) is the
        contracted one.
        """
        own = ax.resolve(self.tensors[name][dim])
        axes = (c.axis for c in self.contractions if name in c.sources)
        return any(set(ax.atoms(axis)) & set(ax.atoms(own)) >= {atom} for axis in axes)

    def _numel_of_unit(self, member: Member, atom: Atom) -> int:
        shape = [ax.axis_size(axis) for axis in self.tensors[member.parameter]]
        return member.index.shape[1] * _numel(
            tuple(s for i, s in enumerate(shape) if i != member.dim)
        )

    def _kind(
        self, atom: Atom, where: list, attention: set[Atom], beside: set[Atom], layer: int | None
    ) -> Kind:
        if atom in attention:
            others = {a for n, d in where for a in ax.atoms(self.tensors[n][d])} & attention - {
                atom
            }
            shared = "broadcast" in atom.tags and any(
                "broadcast" not in other.tags for other in others
            )
            return "query_head" if shared else "attention"
        if "expert" in atom.tags:
            return "expert"
        if atom in beside or "head_dim" in atom.tags:
            return "head_dim"
        if "residual" in atom.tags and layer is None:
            return "channel"
        if len(where) == 1:
            return "other"
        if any(len(self.tensors[name]) > 2 for name, _ in where) and layer is None:
            return "channel"  # of a convolution
        return "mlp" if "nonlinear" in atom.tags else "other"

    def _place(self, names: list[str]) -> tuple[str, int | None, str]:
        """The innermost module that holds all of these parameters, its layer in a `ModuleList`, its
        path from there.
        """
        paths = [name.split(".")[:-1] for name in names]
        common: list[str] = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        for i, part in enumerate(common):
            if part.isdigit() and isinstance(
                self.model.get_submodule(".".join(common[:i])), nn.ModuleList
            ):
                return ".".join(common), int(part), ".".join(common[i - 1 :])
        return ".".join(common), None, ".".join(common)


def _table(owners: Tensor, units: int) -> Tensor:
    """LongTensor [units, width]: the positions each unit owns, from the owner of every position."""
    return owners.argsort(stable=True)[int((owners < 0).sum()) :].view(units, -1)


def _name(drafts: list[dict[str, Any]]) -> list[str]:
    """Unique names: the module, from its `ModuleList` on where that is enough, and its kind unless
    the main one.
    """
    full: dict[str, set[str]] = defaultdict(set)
    for draft in drafts:
        full[draft["short"]].add(draft["module"])
    names = []
    for draft in drafts:
        short = draft.pop("short")
        path = short if len(full[short]) == 1 else draft["module"]
        main = draft["kind"] in ("attention", "mlp") and path
        names.append(path if main else f"{path}.{draft['kind']}".lstrip("."))
    counts, seen = Counter(names), Counter[str]()
    for i, (name, draft) in enumerate(zip(names, drafts, strict=True)):
        if counts[name] > 1:
            kind = "" if name.endswith(draft["kind"]) else f".{draft['kind']}"
            names[i] = f"{name}{kind}.{seen[name]}"
            seen[name] += 1
    return names


def _numel(shape: tuple[int, ...] | list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
