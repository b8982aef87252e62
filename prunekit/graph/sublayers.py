"""Sublayers: what goes of a layer where a group loses all of its units.

An attention block returns the output of its output projection, an FFN that of its down projection.
With no unit left this output is the projection's bias, or zero, whatever the module does before.
Such a module need not run any more (`EmptySublayer` of `modeling_prunekit` takes its place), and
most could not: torch can't tell how many heads a tensor without numbers has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunekit.graph.groups import CoupledGroup, Sublayer
from prunekit.model.modeling_prunekit import layer_of
from prunekit.model.stack import hidden_of_call, hidden_of_output


@dataclass(frozen=True, eq=False)
class _Run:
    """One run of a module: the hidden states that it was given, and what it returned."""

    given: Tensor | None
    returned: Any


@dataclass(eq=False)
class SublayerWatch:
    """Sees what every module inside a layer returns while the model is captured."""

    runs: dict[str, list[_Run]] = field(default_factory=lambda: defaultdict(list))
    _undropped: dict[int, Tensor] = field(default_factory=dict)  # id of a dropout's output → input

    def attach(self, model: nn.Module) -> None:
        """Look at every call of a module inside a layer from now on; forget those seen before."""
        self.runs.clear()
        self._undropped.clear()
        for path, module in model.named_modules():
            if layer_of(model, path) is not None:
                module.register_forward_hook(partial(self._note_run, path), with_kwargs=True)

    def _note_run(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = hidden_of_call(args, kwargs)
        self.runs[path].append(_Run(given, output))
        if isinstance(module, nn.Dropout) and given is not None:
            self._undropped[id(output)] = given

    def complete(self, model: nn.Module, group: CoupledGroup) -> CoupledGroup:
        """The group, which knows what goes when all of its units go, or why one must stay."""
        reason = _exclude(model, group)
        sublayer = None if reason else self._find_sublayer(model, group)
        if not reason and not sublayer and not _runs_without_units(model, group):
            reason = f"{group.module or 'the model'} does more than to return what they make"
        return replace(group, sublayer=sublayer, must_stay=reason)

    def _find_sublayer(self, model: nn.Module, group: CoupledGroup) -> Sublayer | None:
        """The innermost module that returns what the group's consumer makes; None: there is none.

        It must return hidden states of the shape that it was given.
        """
        weight = group.consumers[0].parameter
        consumer = weight.rpartition(".")[0]
        for path in _paths_around(model, consumer):
            run = self.runs[path][0] if len(self.runs[path]) == 1 else _Run(None, None)
            output = hidden_of_output(run.returned)
            if run.given is None or output is None or output.shape != run.given.shape:
                continue
            values = run.returned
            outputs = len(values) if isinstance(values, tuple | list) else None
            if path == consumer and not weight.endswith(".weight"):  # experts, stacked
                own = {f"{path}.{name}" for name in model.get_submodule(path)._parameters}
                if own <= {member.parameter for member in group.members}:
                    return Sublayer(module=path, consumer="", outputs=outputs)
            elif path != consumer and self._made_by(output, consumer):
                inner = consumer.removeprefix(f"{path}.")
                return Sublayer(module=path, consumer=inner, outputs=outputs)
        return None

    def _made_by(self, output: Tensor, consumer: str) -> bool:
        """Whether an output is what a consumer returned in its only run, dropout aside."""
        while id(output) in self._undropped:
            output = self._undropped[id(output)]
        runs = self.runs[consumer]
        return len(runs) == 1 and runs[0].returned is output


def _exclude(model: nn.Module, group: CoupledGroup) -> str | None:
    """Why a group can't lose all of its units, whatever its modules return; or None."""
    if group.kind == "query_head":
        return "its attention group is what can go as a whole"
    if group.kind not in ("attention", "mlp"):
        return f"only attention heads and FFN channels can all go, not units of kind {group.kind}"
    if group.layer is None:
        return "they lie in no layer"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "the cache of an encoder and a decoder counts tokens by each of its layers"
    if len(group.consumers) != 1:
        return f"{len(group.consumers)} matrices read them"
    return None


def _paths_around(model: nn.Module, path: str) -> Iterator[str]:
    """A module's path and those of the modules around it inside its layer, the innermost first."""
    while layer_of(model, path.rpartition(".")[0]) is not None:
        yield path
        path = path.rpartition(".")[0]


def _runs_without_units(model: nn.Module, group: CoupledGroup) -> bool:
    """Whether the modules of an FFN run at a width of zero: plain linears do."""
    paths = {member.parameter.rpartition(".")[0] for member in group.members}
    return group.kind == "mlp" and all(type(model.get_submodule(p)) is nn.Linear for p in paths)
