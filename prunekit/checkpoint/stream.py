"""Models larger than memory: a skeleton on meta, and the weights of one layer at a time from the shards on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checkpoint.load import adopt, only_ours, read_config, skeleton_of, tied_places
from prunekit.checkpoint.manifest import check_manifest
from prunekit.checkpoint.shards import Shards
from prunekit.errors import CheckpointError, DataError

_WHOLE = "; a checkpoint whose tensors are not its modules' (experts stored one by one, say) must be loaded whole"
_OBSOLETE = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # tables that older checkpoints hold
_Places = list[tuple[nn.Module, str, str]]  # where one parameter is: module, attribute, name


def open_streamed(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[Any, Shards]:
    """A local model folder, dense or pruned, without its weights.

    Args:
        directory: a local folder.
        dtype: the parameters' once they are loaded; their stored one by default.
        trust_remote_code: allow transformers to run code that comes with the checkpoint.
        attn_implementation: transformers' choice.

    Returns:
        The model in evaluation mode, every parameter on meta in the file's shape and every buffer real; and the shards,
        by the model's names.

    Raises:
        CheckpointError: the folder is missing or damaged, a tensor is missing, left over or of another shape.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{directory}: expected a local model folder, found none")
    check_manifest(folder)
    shards = Shards.of_folder(folder)
    config = read_config(folder)
    model = skeleton_of(folder, config, attn_implementation, trust_remote_code, shards.dtype)
    dense = not only_ours(config)
    shards = _by_names_of(model, shards, dense)
    if dense:
        _check_shapes(model, shards)
    _take_shapes(model, shards, dtype)
    model.config.dtype = dtype or model.config.dtype
    return model, shards


def _by_names_of(model: Any, shards: Shards, dense: bool) -> Shards:
    """The shards by the model's names: a body's alone lack its prefix, tables no class wants any more are left out.

    A pruned model may store tables that its class would compute: they were cut.
    """
    buffers = persistent_buffers(model) if dense else dict(model.named_buffers())
    tensors = {*dict(model.named_parameters(remove_duplicate=False)), *buffers}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ignored = [*_OBSOLETE, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    names = {}
    for name in shards:
        new = prefix + name if name not in tensors and prefix + name in tensors else name
        if new in tensors or not any(re.search(pattern, new) for pattern in ignored):
            names[new] = name
    return shards.subset(names)


def _check_shapes(model: nn.Module, shards: Shards) -> None:
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if name in shards and shards[name].shape != tensor.shape:
            shape = tuple(tensor.shape)
            raise CheckpointError(f"{shards[name].file}: {name}: expected shape {shape}, got {shards[name].shape}")
    for places in tied_places(model):
        stored = [name for *_, name in places if name in shards]
        if different := [name for name in stored[1:] if not shards.equal(stored[0], name)]:
            raise CheckpointError(
                f"{shards.where}: {stored[0]} and {different[0]} differ, but its config ties them{_WHOLE}"
            )


def _take_shapes(model: nn.Module, shards: Shards, dtype: torch.dtype | None) -> None:
    def on_meta(name: str) -> Tensor:
        own = dtype if shards[name].dtype.is_floating_point else None
        return torch.empty(shards[name].shape, dtype=own or shards[name].dtype, device="meta")

    try:
        adopt(model, {name: on_meta(name) for name in shards}, shards.where)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_WHOLE}") from error
    for path, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                name = f"{path}.{attribute}".lstrip(".")
                module._buffers[attribute] = shards.read([name])[name]


class Weights:
    """Where the weights of a streamed model are: on meta, but for the modules that are loaded at the time.

    Buffers, which are small, stay on the device.

    Args:
        model: what `open_streamed` returned; modules may have been cut since.
        shards: likewise.
        device: where weights are loaded to.
    """

    def __init__(self, model: nn.Module, shards: Shards, device: torch.device | str = "cpu") -> None:
        self.model, self.shards, self.device = model, shards, torch.device(device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)

    def load(self, path: str, source: Shards | None = None) -> None:
        """Read every parameter under a module path that is on meta, in the type it has there.

        Args:
            path: of a module ("model.layers.3").
            source: read these shards instead: what was written of a layer that was cut before. Its buffers are read
                too, and a bias it holds is added to a module that lacks one.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the module's, a shard is damaged.
            DataError: a weight is NaN or infinite.
        """
        if source is not None:
            self._take_additions(path, source)
        self._load(self._under(path), source)

    def release(self, path: str) -> None:
        """Put every parameter under a module path on meta, in the shape it has by now."""
        self._release(self._under(path))

    @contextmanager
    def enter(self, path: str, source: Shards | None = None) -> Iterator[nn.Module]:
        """The module at a path with its weights loaded (`load`), for the duration of a `with` block."""
        try:
            self.load(path, source)
            yield self.model.get_submodule(path)
        finally:
            self.release(path)

    @contextmanager
    def outside(self, layers: str) -> Iterator[None]:
        """Load everything that is not inside the `ModuleList` at a path, for the duration of a `with` block."""
        try:
            self._load(self._beside(layers))
            yield
        finally:
            self._release(self._beside(layers))

    def state(self, path: str) -> dict[str, Tensor]:
        """What a file must hold of a module: its parameters, tied ones once, and its persistent buffers."""
        found = {places[0][2]: _held(places).detach() for places in self._under(path)}
        return found | {name: b for name, b in persistent_buffers(self.model).items() if _lies_in(name, path)}

    def outside_names(self, layers: str) -> dict[str, str]:
        """What a file must hold of everything not inside the `ModuleList` at a path: name → the one in the shards."""
        found = {places[0][2]: _stored_name(places, self.shards) for places in self._beside(layers)}
        buffers = (name for name in persistent_buffers(self.model) if not _lies_in(name, layers))
        return found | {name: name for name in buffers}

    def _under(self, path: str) -> list[_Places]:
        return [places for places in tied_places(self.model) if any(_lies_in(name, path) for *_, name in places)]

    def _beside(self, layers: str) -> list[_Places]:
        return [places for places in tied_places(self.model) if not any(_lies_in(name, layers) for *_, name in places)]

    def _owned_by(self, module: nn.Module) -> list[_Places]:
        return [places for places in tied_places(self.model) if any(owner is module for owner, *_ in places)]

    @torch.inference_mode(False)
    def _load(self, found: list[_Places], source: Shards | None = None) -> None:
        for places in found:
            if not (old := _held(places)).is_meta:
                continue
            shards = self.shards if source is None else source
            name = _stored_name(places, shards)
            if shards[name].shape != old.shape:
                shape = tuple(old.shape)
                raise CheckpointError(f"{shards[name].file}: {name}: expected shape {shape}, got {shards[name].shape}")
            tensor = shards.read([name], self.device, old.dtype)[name]
            if not torch.isfinite(tensor).all():
                raise DataError(f"{name}: the weights hold NaN or infinity")
            _put(places, tensor, old.requires_grad)

    @torch.inference_mode(False)
    def _release(self, found: list[_Places]) -> None:
        for places in found:
            if not (old := _held(places)).is_meta:
                _put(places, torch.empty_like(old, device="meta"), old.requires_grad)

    def _take_additions(self, path: str, source: Shards) -> None:
        for name in source:
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if attribute in module._buffers and _lies_in(name, path):
                module._non_persistent_buffers_set.discard(attribute)
                module._buffers[attribute] = source.read([name], self.device)[name]
            elif attribute == "bias" and _lies_in(name, path) and getattr(module, "bias", None) is None:
                like = next(module.parameters(recurse=False))
                module.bias = nn.Parameter(torch.empty(source[name].shape, dtype=like.dtype, device="meta"))


def _held(places: _Places) -> nn.Parameter:
    module, attribute, _ = places[0]
    parameter = module._parameters[attribute]
    assert parameter is not None
    return parameter


def _stored_name(places: _Places, shards: Shards) -> str:
    """Which of a parameter's names the shards know it by; the first where they know none."""
    return next((name for *_, name in places if name in shards), places[0][2])


def _put(places: _Places, tensor: Tensor, requires_grad: bool) -> None:
    parameter = nn.Parameter(tensor, requires_grad=requires_grad)
    for module, attribute, _ in places:
        module._parameters[attribute] = parameter


def _lies_in(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's state, by name."""
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


@contextmanager
def offloaded(model: nn.Module, shards: Shards, device: torch.device | str = "cpu") -> Iterator[Weights]:
    """Let a streamed model run as it is, for the duration of a `with` block: weights are read when they are needed.

    Every entry of the outermost module lists (a decoder layer) is loaded when it is called and dropped after; so is
    what any other module owns itself. Inputs must be on the device. Not for training.

    Raises:
        CheckpointError, DataError: while the model runs, as `Weights.load` does.
    """
    weights = Weights(model, shards, device)
    with ExitStack() as hooks:
        for module, find in _units(model, "", weights):
            hooks.callback(module.register_forward_pre_hook(_caller(weights._load, find)).remove)
            hooks.callback(module.register_forward_hook(_caller(weights._release, find), always_call=True).remove)
        yield weights


def _caller(action: Callable[[list[_Places]], None], find: Callable[[], list[_Places]]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        action(find())

    return hook


def _units(module: nn.Module, path: str, weights: Weights) -> Iterator[tuple[nn.Module, Callable[[], list[_Places]]]]:
    """The modules to load at once, and how to find what they hold."""
    if module._parameters:
        yield module, partial(weights._owned_by, module)
    for name, child in module.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if isinstance(module, nn.ModuleList):
            yield child, partial(weights._under, inner)
        else:
            yield from _units(child, inner, weights)
