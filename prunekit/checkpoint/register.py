"""Teach transformers' auto classes of this process to load folders of pruned models."""

from __future__ import annotations

from functools import cache, wraps
from pathlib import Path
from typing import Any

from prunekit.model.modeling_prunekit import pruned_classes
from prunekit.model.record import is_ours

_ATTRIBUTE = "_prunekit"  # on the function that replaces transformers'


def register_with_transformers() -> None:
    """From now on `AutoModelForCausalLM.from_pretrained` (`AutoModel`, `AutoConfig`, …) loads
    pruned folders too.

    Only folders whose config holds what `prunekit.save_pretrained` writes of pruned sizes take
    another way than before: `AutoConfig` hands out a class of their own, for which models of their
    own are registered. No code of the folder is run. Files that are not as they were saved are a
    CheckpointError; the numbers in the weights only `prunekit.from_pretrained` compares with their
    checksums. Calling it again changes nothing.
    """
    from transformers import AutoConfig

    original = AutoConfig.from_pretrained
    if hasattr(original, _ATTRIBUTE):
        return

    @wraps(original)
    def from_pretrained(pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        from transformers import PreTrainedConfig

        config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not is_ours(config):
            return original(pretrained_model_name_or_path, **kwargs)
        if Path(pretrained_model_name_or_path).is_dir():
            from prunekit.checkpoint.manifest import check_manifest

            check_manifest(Path(pretrained_model_name_or_path), weights=False)
        kwargs = {
            key: value
            for key, value in kwargs.items()
            if key not in ("trust_remote_code", "code_revision")
        }
        kwargs |= {"_from_auto": True, "name_or_path": pretrained_model_name_or_path}
        return _registered(config["model_type"]).from_pretrained(
            pretrained_model_name_or_path, **kwargs
        )

    setattr(from_pretrained, _ATTRIBUTE, original)
    AutoConfig.from_pretrained = staticmethod(from_pretrained)  # type: ignore[assignment]


@cache
def _registered(model_type: str) -> Any:
    """The config class of a type's pruned models, known to the auto classes."""
    from transformers import AutoModel, AutoModelForCausalLM

    config, body, causal = pruned_classes(model_type, __name__)
    AutoModel.register(config, body, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)
    return config
