"""Teach transformers' auto classes of this process to load folders of pruned models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.manifest import check_manifest
from prunekit.model.classes import auto_classes
from prunekit.model.compat import replace_config_loader
from prunekit.model.modeling_prunekit import pruned_classes, pruned_config
from prunekit.model.record import is_ours

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def register_with_transformers() -> None:
    """Let `from_pretrained` of transformers' auto classes load pruned folders too, from now on.

    Only folders whose config holds the record of pruned sizes that `prunekit.save_pretrained`
    writes are loaded another way than before: `AutoConfig` returns a config class of prunekit's
    for them, and for that class model classes of prunekit's are registered. No code of the folder
    is run. A file that was changed after it was saved is a CheckpointError; the numbers in the
    weights are compared with their checksums by `prunekit.from_pretrained` alone. A second call
    changes nothing.
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
    return _register_classes(config).from_pretrained(source, **kwargs)


def _register_classes(config: Mapping[str, Any]) -> Any:
    """The config class of a folder's type, known to all auto classes that have models for it."""
    import transformers

    model_type, names = config["model_type"], config.get("architectures") or ()
    cut = [str(name).removeprefix("Pruned") for name in names]
    for auto, classes in auto_classes(model_type).items():
        name = next((name for name in classes if name in cut), classes[0])
        own = pruned_classes(model_type, __name__, name)
        getattr(transformers, auto).register(*own, exist_ok=True)
    return pruned_config(model_type, __name__)
