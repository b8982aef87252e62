"""What other programs need to read a pruned model's folder."""

from prunekit.exports.folder import CODE, describe, is_ours, record_of, stock_class
from prunekit.exports.register import register_with_transformers

__all__ = ["CODE", "describe", "is_ours", "record_of", "register_with_transformers", "stock_class"]
