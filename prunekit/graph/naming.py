"""The location of a coupled group in its model, and its name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from prunekit.graph.groups import Kind
from prunekit.model.modeling_prunekit import place_in_stack

# Groups of these kinds have the name of their module; other groups have their kind as a suffix.
_MAIN_KINDS = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class Location:
    """The innermost module that holds all parameters of a group.

    Args:
        module: its path.
        layer: its index in the outermost `nn.ModuleList` around it, None where there is none.
        short: its path from that list on (`layers.3.mlp`); the whole path where there is none.
    """

    module: str
    layer: int | None
    short: str


def locate(model: nn.Module, parameters: Sequence[str]) -> Location:
    """Find the innermost module that holds all of these parameters."""
    paths = [name.split(".")[:-1] for name in parameters]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    module = ".".join(common)
    place = place_in_stack(model, module)
    if place is None:
        return Location(module=module, layer=None, short=module)
    stack, layer = place
    around = stack.rpartition(".")[0]
    return Location(module=module, layer=layer, short=module.removeprefix(f"{around}."))


def choose_names(groups: Sequence[tuple[Location, Kind]]) -> list[str]:
    """Give each group a name that no other group has.

    The name is the short path of the group's module, or the full path where two modules share the
    short one; then the kind, unless it is a main kind; then a number, where names are still equal.
    """
    modules: dict[str, set[str]] = defaultdict(set)
    for location, _ in groups:
        modules[location.short].add(location.module)
    names = []
    for location, kind in groups:
        path = location.short if len(modules[location.short]) == 1 else location.module
        is_plain = path and kind in _MAIN_KINDS
        names.append(path if is_plain else f"{path}.{kind}".lstrip("."))
    return _number_equal_names(names, [kind for _, kind in groups])


def _number_equal_names(names: Sequence[str], kinds: Sequence[Kind]) -> list[str]:
    """Tell groups of one name apart by their kind and a running number."""
    counts, seen = Counter(names), Counter[str]()
    numbered = []
    for name, kind in zip(names, kinds, strict=True):
        if counts[name] == 1:
            numbered.append(name)
            continue
        suffix = "" if name.endswith(kind) else f".{kind}"
        numbered.append(f"{name}{suffix}.{seen[name]}")
        seen[name] += 1
    return numbered
