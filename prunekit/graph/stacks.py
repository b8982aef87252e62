"""Stacks: lists of layers that run one after another, of which whole layers can be dropped.

Where a layer is dropped, the hidden states that entered it go to the next layer. This depth pruning
costs little where a layer adds little to the residual stream (Men et al. 2024, section 3).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunekit.graph.groups import LayerStack
from prunekit.model.names import layer_counts
from prunekit.model.stack import (
    config_around,
    foreign_index,
    hidden_of_call,
    hidden_of_output,
    layers_in,
    module_lists,
)
from prunekit.model.ties import names_after

_SHAPELESS = "a layer takes or returns no hidden states that another could take"


@dataclass
class Watch:
    """Sees how the layers of every outermost `ModuleList` run while the model is captured.

    Args:
        calls: path of a list → the indices of its layers, in the order in which they were called.
        problems: path of a list → why its layers can't be passed over.
        last: path of a list → the hidden states that the layer called last was given.
    """

    calls: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    problems: dict[str, str] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, model: nn.Module) -> None:
        """Look at every call of a layer from now on, and forget those seen before."""
        for seen in (self.calls, self.problems, self.last):
            seen.clear()
        for path, stack in module_lists(model).items():
            for index, layer in layers_in(stack).items():
                layer.register_forward_hook(partial(self._note_call, path, index), with_kwargs=True)

    def _note_call(
        self, path: str, index: int, _: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        self.calls[path].append(index)
        before, after = hidden_of_call(args, kwargs), hidden_of_output(output)
        if before is None or after is None or before.shape != after.shape:
            self.problems.setdefault(path, _SHAPELESS)
        elif index and before is self.last.get(path):
            self.problems.setdefault(path, "its layers run side by side")
        if before is not None:
            self.last[path] = before

    def find_problem(self, path: str, layers: int) -> str | None:
        """Why the layers of a list can't be passed over; None where they can."""
        calls = self.calls[path]
        if not calls or calls != [i % layers for i in range(len(calls))]:
            return "its layers don't run one after another"
        return self.problems.get(path)


def find_stacks(
    model: nn.Module,
    tensors: Iterable[str],
    taken: Iterable[str],
    aliases: Mapping[str, Sequence[str]],
    watch: Watch,
) -> tuple[LayerStack, ...]:
    """Find the lists of layers that run one after another.

    Args:
        model: the model that was traced.
        tensors: names of its parameters and traced buffers; lists without any of them are left out.
        taken: names that coupled groups have.
        aliases: canonical name of a shared tensor → all its names.
        watch: the calls of the layers that were seen while the model was captured.
    """
    tensors, taken = list(tensors), set(taken)
    lists = {
        path: layers
        for path, layers in module_lists(model).items()
        if len(layers) > 1 and any(name.startswith(f"{path}.") for name in tensors)
    }
    names = _choose_names(list(lists), taken)
    stacks = []
    for path, layers in lists.items():
        reason = watch.find_problem(path, len(layers)) or find_misfit(model, path, layers)
        stacks.append(
            LayerStack(
                name=names[path],
                module=path,
                num_units=len(layers),
                prunable=reason is None,
                exact=reason is None,
                reason=reason,
                parameters_per_unit=_mean_parameters(model, path, layers, aliases),
            )
        )
    return tuple(stacks)


def _choose_names(paths: Sequence[str], taken: Container[str]) -> dict[str, str]:
    """Path of a list → its name: the last part of the path if no other has it, or the path."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    names = {}
    for path in paths:
        short = path.rpartition(".")[2]
        name = short if counts[short] == 1 and short not in taken else path
        names[path] = name if name not in taken else f"{name}.layer"
    return names


def find_misfit(model: nn.Module, path: str, stack: nn.ModuleList) -> str | None:
    """Why config or indices of layers can't follow when layers are dropped; None: they can."""
    if len(layers_in(stack)) < len(stack):
        return "entries of its list are None"
    config = config_around(model, path)
    if getattr(config, "is_encoder_decoder", False):
        return "its model has an encoder and a decoder, and config.json holds one list of layers"
    counts = layer_counts(config)
    if counts and len(stack) not in counts:
        return f"the config counts {counts[0]} layers, the list holds {len(stack)}"
    others = [
        p for p, other in module_lists(model).items() if p != path and len(other) == len(stack)
    ]
    if config is not None and any(config_around(model, other) is config for other in others):
        return f"its config counts the entries of {', '.join(others)} too"
    if (attribute := foreign_index(stack)) is not None:
        return f"its layers hold indices of other layers ({attribute})"
    return None


def _mean_parameters(
    model: nn.Module, path: str, stack: nn.ModuleList, aliases: Mapping[str, Sequence[str]]
) -> int:
    """How many parameters go with a layer, on average; parameters shared with others stay."""
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(f"{path}.")
    }
    total = 0
    for index in range(len(stack)):
        left = names_after(sizes, aliases, {path: [index]})
        total += sum(size for name, size in sizes.items() if name not in left)
    return round(total / len(stack))
