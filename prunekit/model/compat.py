"""Every place where something of transformers is worked around, each with its reason.

All were seen in transformers 5.23 with huggingface_hub 1.x. None changes a class that other models
share: attributes are set on the instance of one model or config. The one exception happens only
when the user calls `prunekit.register_with_transformers` (see `replace_config_loader`).
`modeling_prunekit`, which is copied beside saved models and can import nothing of prunekit, holds
its own workarounds.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from prunekit.model.modeling_prunekit import pruned_config
from prunekit.runtime.modes import keep_attributes, restoring

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_EXPERTS = "_experts_implementation_internal"
_ATTENTION = "_attn_implementation_internal"
_NO_NUMBERS = ("Infinity", "-Infinity", "NaN")
_REPLACED = "_prunekit"  # an attribute of the function that replaces transformers' own


def read(config: Any, name: str) -> Any:
    """A config attribute's value for the whole model; None where there is none.

    A config with `per_layer_config` raises AmbiguousGlobalPerLayerAttributeError where layers
    differ in an attribute. Its global value, which the class builds the dense model from, is only
    to be had by a private reader.
    """
    reader = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return reader(name, None) if reader else getattr(config, name, None)


def has(config: Any, name: str) -> bool:
    """Whether a config has an attribute, also where layers differ in it (see `read`)."""
    reader = getattr(config, "_hasattr_without_heterogeneous_validation", None)
    return reader(name) if reader else hasattr(config, name)


def make_config(model_type: str, values: Mapping[str, Any]) -> PretrainedConfig:
    """Make the config of a model type, without the checks of its architecture and its frequencies.

    They refuse a hidden size that the number of heads doesn't divide, and frequencies (Phi-3's)
    that are not as many as follow from the two; of a model that lost channels, that is no mistake.
    The class's `__init__` is wrapped by huggingface_hub's `strict`, which runs every validator
    after it; here the wrapped one runs, then the other validators.

    Raises:
        Exception: whatever the class raises of values that it can't take.
    """
    from transformers import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[model_type]
    if "__class_validators__" not in vars(config_class):  # the class has no validators
        return config_class(**values)
    config = config_class.__new__(config_class)
    config_class.__init__.__wrapped__(config, **values)
    for validate in config_class.__class_validators__:
        if validate.__name__ not in ("validate_architecture", "validate_rope"):
            validate(config)
    return config


def decode_floats(value: Any) -> Any:
    """Values of a `config.json`, with its infinities and NaN as numbers.

    JSON has no such numbers: `PretrainedConfig.to_json_string` writes {"__float__": "Infinity"},
    which only `from_pretrained` of a config class reads back.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in _NO_NUMBERS:
            return float(value["__float__"])
        return {name: decode_floats(entry) for name, entry in value.items()}
    return [decode_floats(entry) for entry in value] if isinstance(value, list) else value


@contextmanager
def unvalidated(config: PretrainedConfig) -> Iterator[None]:
    """Let a config be written, during a `with` block, although its class refuses some sizes.

    `PretrainedConfig.save_pretrained` validates first, and refuses a head count that doesn't divide
    the hidden size. `PreTrainedModel.save_pretrained` calls it on the instance of the config, which
    gets a function `save_pretrained` of its own for one call.
    """

    def write(directory: str | Path, **_: Any) -> None:
        vars(config).pop("save_pretrained", None)
        config.to_json_file(Path(directory) / "config.json", use_diff=True)

    with restoring(keep_attributes([config], "save_pretrained")):
        vars(config)["save_pretrained"] = write
        yield


@contextmanager
def written_whole(model: PreTrainedModel) -> Iterator[None]:
    """Let a model be written with all its weights during a `with` block.

    Some classes leave out weights that they compute when they are loaded (Marian its sinusoidal
    positions); a pruned model takes every weight from its folder.
    """
    with restoring(keep_attributes([model], "_keys_to_ignore_on_save")):
        model._keys_to_ignore_on_save = set()
        yield


def let_save_itself(model: PreTrainedModel) -> None:
    """Let transformers' own `save_pretrained` write a pruned model, whose config would refuse it.

    All weights are written, as in `written_whole`, by the names that they have in the model:
    `PreTrainedModel.save_pretrained` would write those that the class's first checkpoints had, and
    stacked experts one by one.

    The class of this one config becomes a subclass without the check. The config can't be made of
    the subclass from the start: the auto classes find the model's class by the class of its config.
    """
    model.config.__class__ = pruned_config(model.config.model_type, __name__)
    model._keys_to_ignore_on_save = set()
    vars(model)["_weight_conversions"] = []


def follows_length(module: nn.Module) -> bool:
    """Whether a module computes its rotary frequencies anew where a text is long.

    transformers' decorator `dynamic_rope_update` does so in the forward pass of the module, whose
    `rope_type` is a word, or a word for each type of layers.
    """
    kinds = vars(module).get("rope_type")
    words = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(isinstance(word, str) and _grows(word) for word in words)


def keep_frequencies(model: nn.Module) -> None:
    """Let every module keep the rotary frequencies that it has, however long a text is.

    Which ones a text gets depends on numbers; to what they are coupled does not.
    """
    for module in filter(follows_length, model.modules()):
        kinds: Any = module.rope_type
        fixed: Any = dict.fromkeys(kinds, "default") if isinstance(kinds, Mapping) else "default"
        module.rope_type = fixed


def _grows(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


@contextmanager
def experts_computed(model: nn.Module, how: Literal["eager", "batched_mm"]) -> Iterator[None]:
    """Compute stacked experts in a certain way during a `with` block.

    "eager" multiplies one expert after another, "batched_mm" gathers the weights of each token's
    experts. `PreTrainedModel.set_experts_implementation` would check whether the class can, by
    reading its source file, and can't put several configs back to different values.
    """
    with _set_in_configs(model, _EXPERTS, how):
        yield


@contextmanager
def computed_in_any_type(model: nn.Module) -> Iterator[None]:
    """Compute attention and stacked experts by plain operators during a `with` block.

    Flash attention takes half precision only, a grouped matrix product no float64.
    `PreTrainedModel.set_attn_implementation` can't put several configs back to different values.
    """
    with (
        _set_in_configs(model, _ATTENTION, "eager", kept=(None, "eager", "sdpa")),
        experts_computed(model, "eager"),
    ):
        yield


@contextmanager
def _set_in_configs(
    model: nn.Module, attribute: str, value: str, kept: Container[Any] = ()
) -> Iterator[None]:
    """Set a private attribute of all configs that have it, unless its value is to be kept."""
    configs = {}
    for module in model.modules():
        own = getattr(getattr(module, "config", None), "__dict__", {})
        if attribute in own and own[attribute] not in kept:
            configs[id(own)] = module.config
    with restoring(keep_attributes(configs.values(), attribute)):
        for config in configs.values():
            vars(config)[attribute] = value
        yield


def replace_config_loader(
    handles: Callable[[Mapping[str, Any]], bool],
    load: Callable[..., PretrainedConfig],
) -> None:
    """Let `AutoConfig.from_pretrained` of this process load some folders another way.

    The auto classes choose a config class by `model_type` alone, and offer no way to choose by what
    else the config says: the function has to be replaced. Other folders go to the original.
    Calling it again changes nothing.

    Args:
        handles: whether a folder with this config is loaded by `load`.
        load: takes the folder or hub name, its config, and the keyword arguments of the call.
    """
    from transformers import AutoConfig

    original = AutoConfig.from_pretrained
    if hasattr(original, _REPLACED):
        return

    @wraps(original)
    def from_pretrained(pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        from transformers import PreTrainedConfig

        config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not handles(config):
            return original(pretrained_model_name_or_path, **kwargs)
        return load(pretrained_model_name_or_path, config, **kwargs)

    setattr(from_pretrained, _REPLACED, original)
    AutoConfig.from_pretrained = staticmethod(from_pretrained)  # type: ignore[assignment]
