"""Copies of the weights that choosing and repairing may change, to undo both after a failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunekit.graph import Group
from prunekit.runtime.console import say


def take_snapshot(
    model: nn.Module, groups: Sequence[Group], everything: bool, copies: bool = True
) -> dict[str, Tensor | None]:
    """Copy the weights that may change to host memory.

    Args:
        model: the model.
        groups: the groups that are to be pruned.
        everything: all members may change, and not only consumers and their biases.
        copies: copy weights; otherwise only note which biases are missing.

    Returns:
        Name of a parameter → a copy of it; None for a bias that its module lacks.
    """
    names = {m.parameter for g in groups for m in (g.members if everything else g.consumers)}
    parameters = dict(model.named_parameters())
    kept: dict[str, Tensor | None] = {}
    if copies:
        for name in names & parameters.keys():
            kept[name] = parameters[name].detach().to("cpu", copy=True)
    for name in {f"{name.rpartition('.')[0]}.bias" for name in names} - names:
        module = model.get_submodule(name.rpartition(".")[0])
        if "bias" not in module._parameters:
            continue
        if (bias := module._parameters["bias"]) is None:
            kept[name] = None
        elif copies:
            kept[name] = bias.detach().to("cpu", copy=True)
    return kept


def restore(model: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """Put copies back; a bias that was not there goes."""
    for name, weight in before.items():
        if weight is None:
            model.get_submodule(name.rpartition(".")[0])._parameters["bias"] = None
        else:
            model.get_parameter(name).data.copy_(weight)


def note_biases(model: nn.Module, given: Sequence[nn.Module]) -> None:
    """Tell the config which modules were given a bias, so that a saved model is loaded with it."""
    config: Any = getattr(model, "config", None)
    paths = [path for path, module in model.named_modules() if module in set(given)]
    if paths and config is not None:
        config.extra_biases = sorted({*paths, *(getattr(config, "extra_biases", None) or ())})
        say(
            f"{len(paths)} modules got a bias: prunekit.from_pretrained loads it, "
            "other loaders leave it out"
        )
