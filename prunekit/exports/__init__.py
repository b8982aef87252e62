"""What other programs need to read a pruned model, in their format or in its folder.

What a target can't express is an `ExportError` that says why and what would. The writers of other formats are modules
that nothing imports until one is asked for (`prunekit.exports.gguf`).
"""

from prunekit.exports.folder import CODE, describe, is_ours, record_of, stock_class
from prunekit.exports.register import register_with_transformers

__all__ = ["CODE", "describe", "is_ours", "record_of", "register_with_transformers", "stock_class"]
