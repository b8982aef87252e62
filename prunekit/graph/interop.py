"""A coupled group as a torch-pruning group, for the pruners and importances of that library.

torch-pruning follows dependencies from member to member; here they form a star around one member,
and each maps a position to its unit and on to every position that unit owns, so that the whole
coupling is followed from any member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.errors import TraceError
from prunekit.model.ties import tensor_places

if TYPE_CHECKING:
    from torch_pruning.dependency import Dependency, DependencyGraph, Node
    from torch_pruning.dependency import Group as TorchPruningGroup

    from prunekit.graph.groups import CoupledGroup

# What torch-pruning's own pruners cut: module class → (attribute, dim) → whether these are output
# or input channels of the module.
_NORM = {(name, 0): "out" for name in ("weight", "bias", "running_mean", "running_var")}
_LINEAR = {("weight", 0): "out", ("bias", 0): "out", ("weight", 1): "in"}
_SIDES: dict[type[nn.Module], dict[tuple[str, int], str]] = {
    nn.modules.conv._ConvTransposeNd: {
        ("weight", 1): "out",
        ("bias", 0): "out",
        ("weight", 0): "in",
    },
    nn.modules.conv._ConvNd: _LINEAR,
    nn.Linear: _LINEAR,
    nn.modules.batchnorm._BatchNorm: _NORM,
    nn.LayerNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.PReLU: _NORM,
    nn.Embedding: {("weight", 1): "out"},
}
# Classes of torch.nn that keep no size of the tensors they hold.
_HOLDERS = (
    nn.Module,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)
# Sizes that transformers' Conv1D keeps beside its weight: attribute → the weight's dim.
_SIZES = {"nx": 0, "nf": 1}
# A module, the function that cuts it, and the positions of the units there: [num_units, width].
Item = tuple["Node", Any, Tensor]


def to_torch_pruning(
    group: CoupledGroup, model: nn.Module, units: Sequence[int] | None = None
) -> TorchPruningGroup:
    """Convert units of a group to the torch-pruning group that cuts them out of the model.

    Its `prune()` cuts them in place; `prune(idxs)` cuts, as wholes, the units that own these
    positions of its first item; torch-pruning's importances score it. Neither it nor the coupling
    graph fits the model afterwards. Weights that a model ties come apart, and what torch-pruning
    knows nothing of (head counts, the groups of a GroupNorm that has no weight, the config) keeps
    its value: both are the caller's to put right, as with torch-pruning's own groups;
    `prunekit.apply_plan` does it by itself.

    Args:
        group: a prunable group of `trace(model, ...)`.
        model: the model it was traced from, not cut since.
        units: unit indices in [0, num_units); None for all of them, which is what an importance
            wants.

    Raises:
        TraceError: the group isn't prunable, a unit is out of range, or torch-pruning can't cut one
            of its members.
    """
    from torch_pruning.dependency import DependencyGraph

    if not group.prunable:
        raise TraceError(f"{group.name} can't be pruned: {group.reason}")
    units = range(group.num_units) if units is None else units
    if not len(units) or not all(0 <= unit < group.num_units for unit in units):
        raise TraceError(
            f"{group.name}: units must be some of 0 to {group.num_units - 1}, got {list(units)}"
        )
    graph = DependencyGraph()
    graph.model = model
    graph._module2name = {module: name for name, module in model.named_modules()}
    graph.module2node, graph._param_to_name = {}, {}
    items = _collect_items(graph, group)
    for item in items:
        items[0][0].dependencies.append(_dependency(items[0], item))
        item[0].dependencies.append(_dependency(item, items[0]))
    hub, prune, index = items[0]
    return graph.get_pruning_group(hub.module, prune, index[list(units)].flatten().tolist())


def _collect_items(graph: DependencyGraph, group: CoupledGroup) -> list[Item]:
    """Everything there is to cut, what torch-pruning has pruners for first.

    A weight and the bias that goes with it are one item.
    """
    from torch_pruning.dependency import Node

    items: dict[tuple[nn.Module, Any], Item] = {}
    places = tensor_places(graph.model)
    for member in sorted(group.members, key=lambda member: member.role == "consumer"):
        if member.parameter not in places:
            raise TraceError(f"{group.name}: the model has no tensor called {member.parameter}")
        for module, attribute, _ in places[member.parameter]:
            cut = _find_cutter(
                graph, module, attribute, f"{member.parameter}[{member.dim}]", member.dim
            )
            node = graph.module2node.setdefault(
                module, Node(module, None, graph._module2name[module])
            )
            if isinstance(module, nn.LayerNorm):
                node.pruning_dim = -len(module.normalized_shape)
            if isinstance(module, nn.GroupNorm) and not _keeps_groups(module, member.index):
                raise TraceError(
                    f"{member.parameter}: torch-pruning has no pruner "
                    "for whole groups of a GroupNorm"
                )
            item = items.setdefault((module, cut), (node, cut, member.index))
            assert torch.equal(item[2], member.index), (
                f"{member.parameter} is cut elsewhere than its module's weight"
            )
    return sorted(items.values(), key=lambda item: isinstance(item[1].__self__, _TensorPruner))


def _find_cutter(
    graph: DependencyGraph, module: nn.Module, attribute: str, where: str, dim: int
) -> Any:
    """torch-pruning's function for this dim; where it has none, ours for this tensor alone."""
    from torch_pruning.ops import OPTYPE, module2type

    optype, kind = module2type(module), type(module)
    sides = next((sides for known, sides in _SIDES.items() if isinstance(module, known)), None)
    grouped = optype == OPTYPE.CONV and module.groups != 1
    if sides is not None and not grouped and (attribute, dim) in sides:
        pruner = graph.get_pruner_of_module(module)
        return (
            pruner.prune_out_channels
            if sides[attribute, dim] == "out"
            else pruner.prune_in_channels
        )
    torchs = [c for c in kind.__mro__ if c.__module__.startswith("torch.nn.") and c not in _HOLDERS]
    if sides is not None or optype != OPTYPE.ELEMENTWISE or torchs:
        raise TraceError(f"{where}: torch-pruning has no pruner for this part of {kind.__name__}")
    return _TensorPruner(attribute, dim).prune_out_channels


def _keeps_groups(norm: nn.GroupNorm, index: Tensor) -> bool:
    """Whether a unit takes from every group of channels, so that their number stays."""
    return len(set((index[0] * norm.num_groups // norm.num_channels).tolist())) == norm.num_groups


def _dependency(source: Item, target: Item) -> Dependency:
    from torch_pruning.dependency import Dependency

    dependency = Dependency(
        trigger=source[1], handler=target[1], source=source[0], target=target[0]
    )
    dependency.index_mapping[0] = _UnitMapping(source[2], target[2])
    return dependency


class _UnitMapping:
    """Positions in one member → all positions of the same units in another.

    `source` and `target` are the members' index tables, int64 [num_units, width].
    """

    def __init__(self, source: Tensor, target: Tensor) -> None:
        self.source, self.target = source, target

    def __call__(self, idxs: list[Any]) -> list[Any]:
        from torch_pruning._helpers import _HybridIndex

        roots = {hybrid.idx: hybrid.root_idx for hybrid in idxs}
        unit_of = torch.zeros(int(self.source.max()) + 1, dtype=torch.long)
        unit_of[self.source] = torch.arange(len(self.source))[:, None].expand_as(self.source)
        units = unit_of[list(roots)].unique()
        mapped = []
        for source, target in zip(
            self.source[units].tolist(), self.target[units].tolist(), strict=True
        ):
            hit = [roots[position] for position in source if position in roots]
            mapped += [
                _HybridIndex(p, hit[slot * len(hit) // len(target)])
                for slot, p in enumerate(target)
            ]
        return mapped


class _TensorPruner:
    """Cuts one dim of one tensor of a module that torch-pruning has no pruner for.

    It is called as torch-pruning's own pruners are.
    """

    def __init__(self, attribute: str, dim: int) -> None:
        self.attribute, self.dim = attribute, dim
        self.pruning_dim = dim  # torch-pruning sets `pruning_dim` before each call

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Remove the positions `idxs` of the dim, in place."""
        old = getattr(layer, self.attribute)
        kept = torch.tensor(sorted(set(range(old.shape[self.dim])) - set(idxs)), device=old.device)
        new = old.detach().index_select(self.dim, kept)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            new.grad = None if old.grad is None else old.grad.index_select(self.dim, kept)
        setattr(layer, self.attribute, new)
        for name, dim in _SIZES.items():
            if name in vars(layer) and self.attribute == "weight":
                setattr(layer, name, new.shape[dim])
        return layer
