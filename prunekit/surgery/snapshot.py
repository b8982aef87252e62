"""Copies of the weights that choosing and repairing may change, to undo both after a failure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from prunekit.graph import Group
from prunekit.model.ties import parameter_places
from prunekit.runtime.console import say
from prunekit.runtime.memory import to_host


class Snapshot:
    """Copies in host memory, made group by group, each just before the group's weights change.

    No copy can go while any layer is still to be repaired, cut or checked: an error in the last
    layer puts the first one back too. Where nothing is to be put back (a model that only this run
    holds; a streamed one, whose dense layers stay on disk), no weight is copied at all.

    Args:
        model: the model.
        everything: all members of a group may change, and not only consumers and their biases.
        copies: copy weights; otherwise only note which biases are missing.
    """

    def __init__(self, model: nn.Module, *, everything: bool, copies: bool) -> None:
        self.model, self.everything, self.copies = model, everything, copies
        # Modules, not names: where whole layers go, the names of later layers change.
        self._kept: dict[tuple[nn.Module, str], Tensor | None] = {}
        self._places = parameter_places(model)

    def keep(self, groups: Iterable[Group]) -> None:
        """Copy what may change of these groups; what is copied already stays."""
        for group in groups:
            for member in group.members if self.everything else group.consumers:
                self.keep_parameters([member.parameter])
                for place in self._places.get(member.parameter, ()):
                    self._keep(place.module, "bias")

    def keep_parameters(self, names: Iterable[str]) -> None:
        """Copy parameters that may change, by their names; what is copied already stays."""
        for name in names:
            path, _, attribute = name.rpartition(".")
            self._keep(self.model.get_submodule(path), attribute)

    def _keep(self, module: nn.Module, attribute: str) -> None:
        """Copy a parameter; None for a bias that its module lacks."""
        if attribute not in module._parameters or (module, attribute) in self._kept:
            return
        parameter = module._parameters[attribute]
        if parameter is None or self.copies:
            own = None if parameter is None else _copy(parameter)
            self._kept[module, attribute] = own

    def restore(self) -> None:
        """Put copies back; a bias that was not there goes."""
        for (module, attribute), before in self._kept.items():
            parameter = module._parameters[attribute]
            if before is None:
                module._parameters[attribute] = None
            elif parameter is not None:
                parameter.data.copy_(before)

    def note_biases(self) -> None:
        """Tell the config which modules were given a bias: a saved model is loaded with it."""
        given = {
            module
            for (module, attribute), before in self._kept.items()
            if before is None and module._parameters[attribute] is not None
        }
        config: Any = getattr(self.model, "config", None)
        paths = [path for path, module in self.model.named_modules() if module in given]
        if paths and config is not None:
            config.extra_biases = sorted({*paths, *(getattr(config, "extra_biases", None) or ())})
            say(
                f"{len(paths)} modules got a bias: prunekit.from_pretrained loads it, "
                "other loaders leave it out"
            )


def _copy(parameter: Tensor) -> Tensor:
    """A copy in host memory. A GPU makes it in the order of its work, and nobody waits for it."""
    return to_host(parameter.detach(), copy=True, wait=False)
