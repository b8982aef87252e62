"""Loads a pruned model in transformers' own way: its stock class, every layer brought to its own
sizes.

Imports torch and transformers only, for it is copied beside models saved with remote code.
`config.json` says what the class can't know: `per_layer_config`, every layer's values, as
transformers has it; `dense_sizes`, values of the model before it was cut, which the class must be
built with; `pruned_sizes`, the shapes of parameters and buffers and the numbers that modules keep,
as far as the class would make others, and the modules that have no units left. One entry serves all
layers: "model.layers.{}.mlp.n".
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1  # of `pruned_sizes`


class LayerConfig:
    """One layer's view of a model's config: its own sizes; all else is read from the model's."""

    def __init__(self, base: Any, overrides: dict[str, Any]) -> None:
        self.__dict__.update(_base=base, _overrides=dict(overrides))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_base" not in self.__dict__:
            raise AttributeError(name)
        name = getattr(self._base, "attribute_map", {}).get(name, name)
        return self._overrides[name] if name in self._overrides else _live(self._base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._overrides[name] = value


def _live(config: Any, name: str) -> Any:
    reader = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return reader(name) if reader else getattr(config, name)


def per_layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """A copy of the config's per-layer values (transformers' `per_layer_config`), as plain
    dictionaries.
    """
    stored = config.to_dict().get("per_layer_config") or {}
    return {int(layer): dict(values) for layer, values in stored.items()}


def place_in_stack(model: nn.Module, path: str) -> tuple[str, int] | None:
    """The layer that a module path lies in: the path of its list, and its index there.

    A list of layers is the first `ModuleList` on the way to the module; None where there is none.
    """
    parts = path.split(".")
    for i, part in enumerate(parts):
        outer = ".".join(parts[:i])
        if part.isdigit() and isinstance(model.get_submodule(outer), nn.ModuleList):
            return outer, int(part)
    return None


def layer_of(model: nn.Module, path: str) -> int | None:
    """Index of the layer that a module path lies in, or None (see `place_in_stack`)."""
    place = place_in_stack(model, path)
    return None if place is None else place[1]


def give_views(model: nn.Module, overrides: Mapping[int, dict[str, Any]]) -> None:
    """Let every module inside a layer see its layer's config; all see the model's where the layers
    agree.

    Rotary frequencies that are computed anew for a long text are read off the config again, which
    refuses what differs from layer to layer: their module sees the dense model's values.
    """
    config: Any = model.config
    for path, module in model.named_modules():
        own = isinstance(module.__dict__.get("config"), LayerConfig | type(config))
        layer = layer_of(model, path) if own else None
        if layer is not None or (own and "rope_type" in vars(module)):
            values = {} if layer is None else overrides.get(layer, {})
            module.config = LayerConfig(config, values) if config.is_heterogeneous else config


@cache
def reads_layers(model_type: str) -> bool:
    """Whether transformers' class of a type builds its layers by `per_layer_config` itself."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        return "per_layer_config" in inspect.getsource(inspect.getmodule(model))  # type: ignore[arg-type]
    except (KeyError, OSError, TypeError):
        return False


def has_own_layers(config: Any) -> bool:
    """Whether a config's `per_layer_config` is what the dense model's class builds its layers by.

    It isn't where prunekit has cut the model: the dense sizes are stated elsewhere then.

    Args:
        config: a config, or what its file holds.
    """
    values = config if isinstance(config, Mapping) else vars(config)
    sizes = values.get("dense_sizes")
    sizes = sizes if isinstance(sizes, Mapping) else {}
    is_cut = isinstance(values.get("pruned_sizes"), Mapping) or "per_layer_config" in sizes
    model_type = getattr(config, "model_type", values.get("model_type"))
    return not is_cut and isinstance(model_type, str) and reads_layers(model_type)


@contextmanager
def as_dense(config: Any) -> Iterator[None]:
    """Let a config state, during a `with` block, the sizes that its class builds the dense model
    from.
    """
    overrides, sizes = per_layer_overrides(config), {**(getattr(config, "dense_sizes", None) or {})}
    dense = sizes.pop("per_layer_config", None)
    if not has_own_layers(config):
        config.per_layer_config = dense or None
    pruned = {name: getattr(config, name) for name in sizes}
    try:
        _set(config, sizes)
        yield
    finally:
        _set(config, pruned)
        config.per_layer_config = overrides or None


def _set(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def fit(model: nn.Module, sizes: Mapping[str, Any], whole: bool = True) -> None:
    """Bring a dense model to its pruned sizes.

    Args:
        model: built `as_dense`; weights, on meta or not, are cut to their first entries: they are
            to be loaded.
        sizes: the `pruned_sizes` of the config.
        whole: the model is of the class that was cut. Otherwise it is the body of that, or has the
            same body under another head.

    Raises:
        ValueError: another version of prunekit wrote the sizes, or they are of another model.
    """
    if (version := sizes.get("format", FORMAT)) != FORMAT:
        raise ValueError(
            f"pruned_sizes: expected format {FORMAT}, got {version!r:.40}: made by another version"
        )
    own = checksum(model)
    if whole and sizes.get("dense", own) != own:
        raise ValueError(
            "pruned_sizes: the config makes another dense model than the one that was cut"
        )
    entries = _Entries(model, sizes, whole)
    resized: dict[int, tuple[Any, nn.Parameter]] = {}  # tied parameters stay tied
    for owner, name, shape in entries(sizes["shapes"]):
        old = owner._parameters.get(name, owner._buffers.get(name))
        if name in owner._buffers:  # it can't be made anew any more: it is in the file
            owner._buffers[name] = _cut(old, shape, owner)
            owner._non_persistent_buffers_set.discard(name)
        else:
            if old is None or id(old) not in resized:
                resized[id(old)] = old, nn.Parameter(_cut(old, shape, owner))
            setattr(owner, name, resized[id(old)][1])
    for owner, name, value in entries(sizes["attributes"]):
        setattr(owner, name, tuple(value) if isinstance(value, list) else value)
    for owner, _, (consumer, outputs) in entries(sizes.get("empty", {})):
        owner.__class__ = empty_class(type(owner), consumer, outputs)


def checksum(model: nn.Module) -> str:
    """16 hexadecimal digits of a SHA-256 of the names and shapes of a model's parameters."""
    shapes = sorted(
        (name, *tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)
    )
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _cut(old: Tensor | None, shape: list[int], owner: nn.Module) -> Tensor:
    if old is None:  # a bias that its class doesn't have
        return torch.zeros_like(
            next(owner.parameters(recurse=False)).detach().flatten()[: shape[0]]
        )
    return old.detach()[tuple(slice(size) for size in shape)].clone(
        memory_format=torch.contiguous_format
    )


def body_path(model: Any) -> str:
    """The path of the body in a model of transformers; empty where the model is one itself."""
    return "" if model.base_model is model else str(model.base_model_prefix)


class _Entries:
    """The entries of a record: module, name in it, value. Modules the model lacks are left out."""

    def __init__(self, model: nn.Module, sizes: Mapping[str, Any], whole: bool) -> None:
        self.modules = dict(model.named_modules())
        self.before = self.here = ""
        if not whole:
            self.before = _inside(sizes.get("body", model.base_model_prefix))  # type: ignore[arg-type]
            self.here = _inside(body_path(model))

    def __call__(self, packed: Mapping[str, str]) -> Iterator[tuple[nn.Module, str, Any]]:
        for pattern, text in packed.items():
            stored = json.loads(text)
            if "{}" in pattern:  # a value for every layer, None where there is no entry
                values = {pattern.format(layer): value for layer, value in enumerate(stored)}
            else:
                values = {pattern: stored}
            for path, value in values.items():
                owner, _, name = self._move(path).rpartition(".")
                if value is not None and owner in self.modules:
                    yield self.modules[owner], name, value

    def _move(self, path: str) -> str:
        """The path in this model of a path in the model that was cut."""
        in_body = path.startswith(self.before)
        return self.here + path.removeprefix(self.before) if in_body else path


def _inside(path: str) -> str:
    """What the paths of modules inside a module begin with."""
    return f"{path}." if path else ""


class EmptySublayer:
    """Goes before the class of a module all of whose units are gone, an attention block or an FFN.

    It returns what the module returns with its consumer's weight zeroed: the bias of the consumer,
    or zeros.

    Attributes:
        stock: the class of the module before.
        consumer: path of the consumer's module inside the module; empty where there is no bias.
        outputs: how many values the module returns; None for the hidden states alone.
    """

    stock: Any
    consumer: str
    outputs: int | None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by what the class was made from: it is made anew in another process."""
        return _unbuilt, (self.stock, self.consumer, self.outputs), vars(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The bias at every position; what the module returned beside it is None."""
        values = [kwargs.get("hidden_states"), *args, *kwargs.values()]
        given = next(value for value in values if isinstance(value, Tensor))
        output = torch.zeros_like(given)
        _count_tokens(self, given, values)
        inner = self.get_submodule(self.consumer) if self.consumer else None  # type: ignore[attr-defined]
        bias = getattr(inner, "bias", None)
        if bias is not None:
            output = output + bias.to(output.dtype)
        return output if self.outputs is None else (output, *[None] * (self.outputs - 1))


def _count_tokens(module: Any, hidden: Tensor, values: list[Any]) -> None:
    """Let a cache among an attention block's arguments hold a zero for each token.

    transformers counts the tokens in a cache by what one of its layers holds, the first one mostly.
    """
    from transformers import Cache

    past = next((value for value in values if isinstance(value, Cache)), None)
    if past is None:
        return
    heads = width = 1
    for layer in past.layers[module.layer_idx : module.layer_idx + 1]:
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.ndim == 4:  # made before, for the heads of the config
            heads, width = keys.shape[1], keys.shape[3]
    zeros = hidden.new_zeros(hidden.shape[0], heads, hidden.shape[1], width)
    past.update(zeros, zeros, module.layer_idx)


_EMPTY_CLASSES: dict[Any, Any] = {}


def empty_class(stock: Any, consumer: str, outputs: int | None) -> Any:
    """The class of modules of a class that have no units left (see `EmptySublayer`)."""
    key = (stock, consumer, outputs)
    if key not in _EMPTY_CLASSES:
        values = {"stock": stock, "consumer": consumer, "outputs": outputs}
        values["__module__"] = stock.__module__
        _EMPTY_CLASSES[key] = type(f"Empty{stock.__name__}", (EmptySublayer, stock), values)
    return _EMPTY_CLASSES[key]


def _unbuilt(stock: Any, consumer: str, outputs: int | None) -> Any:
    """A module of such a class without anything in it."""
    made = empty_class(stock, consumer, outputs)
    return made.__new__(made)


def empty_sublayers(model: nn.Module) -> dict[str, tuple[str, int | None]]:
    """Path of every module that has no units left → its consumer's path and number of outputs."""
    return {
        path: (module.consumer, module.outputs)
        for path, module in model.named_modules()
        if isinstance(module, EmptySublayer)
    }


class _Config:
    """Goes before a config class of transformers: any head count and width is right."""

    def validate_architecture(self) -> None:
        """Any head count is right, whether it divides the hidden size or not."""

    def validate(self) -> None:
        """Called before saving."""

    def __getattribute__(self, key: str) -> Any:
        """The width of experts is read of the whole model by vLLM, which takes a list by layer."""
        try:
            return super().__getattribute__(key)
        except RuntimeError:  # transformers' word for a value that differs from layer to layer
            if key != "moe_intermediate_size":
                raise
        return [getattr(layer, key) for layer in self.per_layer_config]  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by what the class was made from: it is made anew in another process."""
        made_from = self.model_type, type(self).__module__  # type: ignore[attr-defined]
        return _empty_config, made_from, vars(self)


def _empty_config(model_type: str, module: str) -> Any:
    """A config of `pruned_config` without a value."""
    config = pruned_config(model_type, module)
    return config.__new__(config)


class _Model:
    """Goes before a model class of transformers: lets each layer have its own sizes."""

    stock_class: Any = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        sizes = getattr(config, "pruned_sizes", None)
        with as_dense(config):
            # A class that makes its body by an auto class gets one of these, a dense one.
            config.pruned_sizes = None
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        config.pruned_sizes = sizes
        if sizes is None:
            return
        cut = [name.removeprefix("Pruned") for name in config.architectures or ()]
        fit(self, sizes, self.stock_class.__name__ in cut)  # type: ignore[arg-type]
        give_views(self, per_layer_overrides(config))  # type: ignore[arg-type]

    def initialize_weights(self) -> None:
        """Tables that no file holds are computed from the sizes of the dense model.

        Also those that a module computes for others: in classes that are not its own transformers
        takes a module without tensors for one that is initialised. A module that holds nothing but
        what was loaded is left alone: it may know its dense size only.
        """
        for module in self.modules():  # type: ignore[attr-defined]
            tensors = [*module.parameters(), *module.buffers()]
            if tensors and all(getattr(t, "_is_hf_initialized", False) for t in tensors):
                module._is_hf_initialized = True
        vars(self)["is_custom_code"] = lambda: False
        try:
            with as_dense(self.config):  # type: ignore[attr-defined]
                super().initialize_weights()  # type: ignore[misc]
        finally:
            del vars(self)["is_custom_code"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:  # looks into the file of its class
        return cls.stock_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.stock_class._can_set_experts_implementation()


@cache  # transformers copies a config for every layer of every cache that it makes
def pruned_config(model_type: str, module: str) -> Any:
    """The config class of pruned models of a type that transformers knows.

    Equal arguments have the same class, so that a copied config has its original's.

    Args:
        model_type: as in `config.json`.
        module: the name of the module that holds the class.
    """
    from transformers import CONFIG_MAPPING

    stock = CONFIG_MAPPING[model_type]
    return type(stock.__name__, (_Config, stock), {"__module__": module})


@cache
def pruned_model(model_type: str, module: str, name: str) -> Any:
    """The class of pruned models that are else of a class of transformers, by its name."""
    from transformers import GenerationMixin

    stock: Any = stock_model(name, model_type)
    generates = issubclass(stock, GenerationMixin)
    bases = (_Model, stock, GenerationMixin) if generates else (_Model, stock)
    values = {
        "__module__": module,
        "config_class": pruned_config(model_type, module),
        "stock_class": stock,
    }
    return type(f"Pruned{name}", bases, values)


def pruned_classes(model_type: str, module: str, *names: str) -> tuple[Any, ...]:
    """The config class of pruned models of a type, and the model classes of some names."""
    models = (pruned_model(model_type, module, name) for name in names)
    return pruned_config(model_type, module), *models


def stock_model(name: str, model_type: str = "") -> Any:
    """The model class of transformers that has a name; None where there is none.

    Some inner models of a type can only be imported from the file of the type's classes.
    """
    import transformers

    found = getattr(transformers, name, None) if name.isidentifier() else None
    if found is None and model_type in transformers.CONFIG_MAPPING:
        file = transformers.CONFIG_MAPPING[model_type].__module__
        try:
            classes = importlib.import_module(file.replace("configuration_", "modeling_"))
        except ImportError:
            return None
        found = vars(classes).get(name)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and not name.endswith("PreTrainedModel") else None
