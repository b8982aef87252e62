"""Teach transformers' auto classes of this process to load folders of pruned models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.manifest import check_manifest
from prunekit.model.compat import replace_config_loader
from prunekit.model.modeling_prunekit import pruned_classes
from prunekit.model.record import is_ours

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def register_with_transformers() -> None:
    """From now on `AutoModelForCausalLM.from_pretrained` (`AutoModel`, `AutoConfig`, …) loads
    pruned folders too.

    Only folders whose config holds what `prunekit.save_pretrained` writes of pruned sizes take
    another way than before: `AutoConfig` hands out a class of their own, for which models of their
    own are registered. No code of the folder is run. Files that are not as they were saved are a
    CheckpointError; the numbers in the weights only `prunekit.from_pretrained` compares with their
    checksums. Calling it again changes nothing.
    """
    replace_config_loader(is_ours, _load_config)


def _load_config(source: str | Path, config: Mapping[str, Any], **kwargs: Any) -> PretrainedConfig:
    """The config of a pruned folder or hub name, of the class that is registered for its type."""
    if Path(source).is_dir():
        check_manifest(Path(source), weights=False)
    kwargs = {
        key: value
        for key, value in kwargs.items()
        if key not in ("trust_remote_code", "code_revision")
    }
    kwargs |= {"_from_auto": True, "name_or_path": source}
    return _registered(config["model_type"]).from_pretrained(source, **kwargs)


@cache
def _registered(model_type: str) -> Any:
    """The config class of a type's pruned models, known to the auto classes."""
    from transformers import AutoModel, AutoModelForCausalLM

    config, body, causal = pruned_classes(model_type, __name__)
    AutoModel.register(config, body, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)
    return config
