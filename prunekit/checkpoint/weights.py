"""The weights of a streamed model: on meta, but for those of the modules that are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checkpoint.shards import Shards
from prunekit.errors import CheckpointError, DataError
from prunekit.model.stack import layers_in, lies_in, module_lists, place_in_stack
from prunekit.model.ties import Place, parameter_places

_Places = list[Place]  # where one parameter is held


class Weights:
    """Loads the weights of modules from shards and lets go of them again; ties are kept.

    Buffers, which are small, stay on the device.

    Args:
        model: the model that `open_streamed` returned; modules may have been cut since.
        shards: the shards that it returned.
        device: the device that weights are loaded to.
    """

    def __init__(
        self, model: nn.Module, shards: Shards, device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.shards, self.device = model, shards, torch.device(device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)

    def load(self, path: str, fetched: dict[str, Tensor] | None = None) -> None:
        """Read every parameter under a module path that is on meta, in the type it has there.

        Args:
            path: of a module ("model.layers.3").
            fetched: what a `fetcher` has read; it is emptied, and nothing in it is read again.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the module's, a shard is
                damaged.
            DataError: a weight is NaN or infinite.
        """
        self._load(self._under(path), fetched)

    def fetcher(self, path: str) -> Callable[[], dict[str, Tensor]]:
        """A function that reads what `load` would read, into host memory, as it is stored.

        The function looks at no module, so that it may run in a thread while the model changes. Its
        result goes to `load`. It raises the errors of `load` but for those about shapes.
        """
        names = [
            _stored_name(places, self.shards)
            for places in self._under(path)
            if _parameter_at(places).is_meta
        ]
        pinned = self.device.type == "cuda"

        def fetch() -> dict[str, Tensor]:
            fetched: dict[str, Tensor] = {}
            for name in names:
                fetched |= self.shards.read([name], pinned=pinned)
                _check_numbers(name, fetched[name])
            return fetched

        return fetch

    def release(self, path: str) -> None:
        """Put every parameter under a module path on meta, in the shape it has by now."""
        self._release(self._under(path))

    @contextmanager
    def enter(self, path: str) -> Iterator[nn.Module]:
        """Load the weights of the module at a path (`load`) during a `with` block."""
        try:
            self.load(path)
            yield self.model.get_submodule(path)
        finally:
            self.release(path)

    @contextmanager
    def outside(self, layers: str) -> Iterator[None]:
        """Load all weights outside the `ModuleList` at a path during a `with` block."""
        try:
            self._load(self._beside(layers))
            yield
        finally:
            self._release(self._beside(layers))

    def state(self, path: str) -> dict[str, Tensor]:
        """What a file must hold of a module: its parameters and its persistent buffers, by name.

        Of a tied parameter only its first name.
        """
        state = {places[0].name: _parameter_at(places).detach() for places in self._under(path)}
        return state | {
            name: b for name, b in persistent_buffers(self.model).items() if lies_in(name, path)
        }

    def outside_names(self, layers: str) -> dict[str, str]:
        """The parameters and persistent buffers that are not inside the `ModuleList` at a path.

        Returns:
            The model's name → the name in the shards.
        """
        names = {
            places[0].name: _stored_name(places, self.shards) for places in self._beside(layers)
        }
        buffers = (name for name in persistent_buffers(self.model) if not lies_in(name, layers))
        return names | {name: name for name in buffers}

    def _under(self, path: str) -> list[_Places]:
        return [
            places
            for places in parameter_places(self.model).values()
            if any(lies_in(place.name, path) for place in places)
        ]

    def _beside(self, layers: str) -> list[_Places]:
        return [
            places
            for places in parameter_places(self.model).values()
            if not any(lies_in(place.name, layers) for place in places)
        ]

    def _owned_by(self, module: nn.Module) -> list[_Places]:
        return [
            places
            for places in parameter_places(self.model).values()
            if any(place.module is module for place in places)
        ]

    @torch.inference_mode(False)
    def _load(self, parameters: list[_Places], fetched: dict[str, Tensor] | None = None) -> None:
        for places in parameters:
            if not (old := _parameter_at(places)).is_meta:
                continue
            shards = self.shards
            name = _stored_name(places, shards)
            if shards[name].shape != old.shape:
                shape = tuple(old.shape)
                raise CheckpointError(
                    f"{shards[name].file}: {name}: expected shape {shape}, got {shards[name].shape}"
                )
            if fetched and name in fetched:
                # To the device first: another type is made there.
                there = fetched.pop(name).to(self.device, non_blocking=True)
                tensor = there.to(old.dtype)
                checked = tensor is there
            else:
                tensor = shards.read([name], self.device, old.dtype)[name]
                checked = False
            if not checked:
                _check_numbers(name, tensor)
            _put(places, tensor, old.requires_grad)

    @torch.inference_mode(False)
    def _release(self, parameters: list[_Places]) -> None:
        for places in parameters:
            if not (old := _parameter_at(places)).is_meta:
                _put(places, torch.empty_like(old, device="meta"), old.requires_grad)


def _check_numbers(name: str, tensor: Tensor) -> None:
    """Raise DataError where a tensor holds NaN or infinity."""
    # If a tensor holds NaN, so do its extremes. Unlike `isfinite` of the whole tensor, they take no
    # memory.
    extremes = tensor.aminmax() if tensor.numel() else ()
    if not all(torch.isfinite(extreme) for extreme in extremes):
        raise DataError(f"{name}: the weights hold NaN or infinity")


def _parameter_at(places: _Places) -> nn.Parameter:
    module, attribute, _ = places[0]
    parameter = module._parameters[attribute]
    assert parameter is not None
    return parameter


def _stored_name(places: _Places, shards: Shards) -> str:
    """The name of a parameter in the shards; its first name where they hold none of its names."""
    return next((place.name for place in places if place.name in shards), places[0].name)


def _put(places: _Places, tensor: Tensor, requires_grad: bool) -> None:
    parameter = nn.Parameter(tensor, requires_grad=requires_grad)
    for module, attribute, _ in places:
        module._parameters[attribute] = parameter


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's state, by name."""
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


@contextmanager
def offloaded(
    model: nn.Module, shards: Shards, device: torch.device | str = "cpu"
) -> Iterator[Weights]:
    """Let a streamed model run during a `with` block: weights are read when they are needed.

    Every entry of the outermost module lists (a decoder layer) is loaded when it is called, and
    dropped afterwards; so are the parameters that any other module owns itself. Inputs must be on
    the device. Training is not possible.

    Raises:
        CheckpointError: while the model runs, a tensor is missing or a shard is damaged.
        DataError: while the model runs, a weight is NaN or infinite.
    """
    weights = Weights(model, shards, device)
    with ExitStack() as hooks:
        for module, find in _units(weights):
            hooks.callback(module.register_forward_pre_hook(_caller(weights._load, find)).remove)
            hooks.callback(
                module.register_forward_hook(
                    _caller(weights._release, find), always_call=True
                ).remove
            )
        yield weights


def _caller(
    action: Callable[[list[_Places]], None], find: Callable[[], list[_Places]]
) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        action(find())

    return hook


def _units(weights: Weights) -> Iterator[tuple[nn.Module, Callable[[], list[_Places]]]]:
    """The modules to load, each with a function that finds the parameters to load for it.

    For an entry of an outermost module list these are all parameters inside it; for any other
    module, the parameters that it owns itself.
    """
    for path, module in weights.model.named_modules():
        if module._parameters and place_in_stack(weights.model, path) is None:
            yield module, partial(weights._owned_by, module)
    for path, stack in module_lists(weights.model).items():
        for index, layer in layers_in(stack).items():
            yield layer, partial(weights._under, f"{path}.{index}".lstrip("."))
