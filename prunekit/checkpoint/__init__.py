"""Model folders: safetensors and JSON, nothing executed, written whole or not at all."""

from prunekit.checkpoint.load import from_pretrained, load_processor, load_tokenizer
from prunekit.checkpoint.save import save_pretrained
from prunekit.checkpoint.shards import Shards
from prunekit.checkpoint.stream import open_streamed
from prunekit.checkpoint.weights import Weights, offloaded
from prunekit.checkpoint.writer import LayerWriter

__all__ = [
    "LayerWriter",
    "Shards",
    "Weights",
    "from_pretrained",
    "load_processor",
    "load_tokenizer",
    "offloaded",
    "open_streamed",
    "save_pretrained",
]
