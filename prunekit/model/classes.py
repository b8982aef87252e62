"""The class that a model folder is of: any model class of transformers, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from prunekit.model.modeling_prunekit import stock_model
from prunekit.model.record import has_our_code

# What a folder is taken for that names no class: the first of these that its type has.
_GUESSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModel",
)


def find_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that loads and builds a folder's model.

    That is the model class which `architectures` names; an auto class where it names none of
    transformers', or where the folder brings code of its own.

    Args:
        config: the folder's `config.json`; empty for a folder that is not here.
    """
    import transformers

    own = {} if has_our_code(config) else config.get("auto_map") or {}
    named = None if own else _named_class(config)
    return named or getattr(transformers, _guess(config.get("model_type"), own))


def _named_class(config: Mapping[str, Any]) -> Any:
    """The model class that the entry `architectures` names, if it belongs to the model type."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    model_type = str(config.get("model_type"))
    stock = stock_model(name.removeprefix("Pruned"), model_type) if isinstance(name, str) else None
    fits = stock is not None and stock.config_class.model_type == model_type
    return stock if fits else None


def _guess(model_type: object, own_code: Mapping[str, Any]) -> str:
    """The name of the auto class that a folder's own code, or else its type, has a model for."""
    known = own_code or auto_classes(str(model_type))
    return next((name for name in _GUESSES if name in known), _GUESSES[0])


@cache
def auto_classes(model_type: str) -> dict[str, tuple[str, ...]]:
    """Name of an auto class → the names of the model classes that it has for a model type."""
    from transformers.models.auto import modeling_auto

    classes = {}
    for name, auto in vars(modeling_auto).items():
        known = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", {})
        if name.startswith("AutoModel") and model_type in known:
            own = known[model_type]
            classes[name] = (own,) if isinstance(own, str) else tuple(own)
    return classes


def auto_classes_of(model_type: str, architecture: str) -> dict[str, str]:
    """Name of an auto class → the model class that it loads a folder of this architecture with.

    `AutoModel` loads the body where it has one for the type.
    """
    known = auto_classes(model_type)
    bodies = known.get("AutoModel", (architecture,))
    body = architecture if architecture in bodies else bodies[0]
    same = {name: architecture for name, classes in known.items() if architecture in classes}
    return {"AutoModel": body, **same}


def auto_class_of(config: Mapping[str, Any]) -> str:
    """The name of the auto class that loads a folder's model as the class that it is.

    Args:
        config: the folder's `config.json`.
    """
    names = config.get("architectures") or [""]
    name, model_type = str(names[0]).removeprefix("Pruned"), str(config.get("model_type"))
    fitting = [auto for auto, classes in auto_classes(model_type).items() if name in classes]
    first = ("AutoModelForImageTextToText", *_GUESSES[:-1])
    own_heads = [auto for auto in fitting if auto not in ("AutoModelForPreTraining", "AutoModel")]
    for auto in [*(auto for auto in first if auto in fitting), *own_heads, *fitting]:
        return auto
    return _guess(model_type, config.get("auto_map") or {})
