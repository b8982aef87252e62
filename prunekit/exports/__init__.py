"""Files for other programs: what a target can't express is an `ExportError` that says why and what would."""

from prunekit.exports.gguf import Gguf

__all__ = ["Gguf"]
