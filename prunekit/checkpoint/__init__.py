"""Model folders: safetensors and JSON, nothing executed, written whole or not at all."""

from prunekit.checkpoint.load import from_pretrained, load_tokenizer
from prunekit.checkpoint.save import save_pretrained

__all__ = ["from_pretrained", "load_tokenizer", "save_pretrained"]
