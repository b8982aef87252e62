"""Whether devices can share each layer of a model out among them: tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prunekit.errors import ExportError
from prunekit.model.compat import has, read
from prunekit.model.inputs import text_config
from prunekit.model.modeling_prunekit import per_layer_overrides
from prunekit.model.names import SYNONYMS, num_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Quantity → what a message calls it. A device holds some of the heads and of the FFN channels.
_SHARED = {
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key-value heads",
    "intermediate_size": "FFN channels",
}


def check_tensor_parallel(model: PreTrainedModel, devices: int, dense: bool = False) -> None:
    """Raise ExportError where a layer can't be shared out evenly.

    Key-value heads may be fewer than the devices: each head then lies on several.

    Args:
        model: a causal language model of transformers, dense or pruned.
        devices: how many share each layer.
        dense: whether the model is to be pruned first: what a cut can mend passes.
    """
    for layer, name, size in _sizes(text_config(model)):
        repeated = name == "key-value heads" and size and devices % size == 0
        if size % devices == 0 or repeated:
            continue
        here = f"got {size} {name} in layer {layer}"
        if 0 < size < devices:
            raise ExportError(
                f"export.tensor_parallel={devices}: expected at least {devices}, {here}; "
                "ask for fewer devices"
            )
        if not dense:
            raise ExportError(
                f"export.tensor_parallel={devices}: expected a multiple of {devices}, {here}; "
                f"prune with export.tensor_parallel={devices}, which keeps such numbers, or ask "
                "for fewer devices"
            )


def _sizes(config: Any) -> Iterator[tuple[int, str, int]]:
    """(layer, what is counted, how many) for all that a config says of its layers."""
    overrides = per_layer_overrides(config)
    for layer in range(num_layers(config) or 0):
        own = overrides.get(layer, {})
        for quantity, called in _SHARED.items():
            for name in SYNONYMS[quantity]:
                size = own[name] if name in own else has(config, name) and read(config, name)
                if isinstance(size, int) and not isinstance(size, bool):
                    yield layer, called, size
