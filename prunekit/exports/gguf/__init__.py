"""GGUF files for llama.cpp."""

from prunekit.exports.gguf.writer import Gguf

__all__ = ["Gguf"]
