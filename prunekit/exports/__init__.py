"""Files that other programs read; nothing imports a format before it is asked for."""

from prunekit.exports.base import Export, Written

__all__ = ["Export", "Written"]
