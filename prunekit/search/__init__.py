"""Where to cut, found by search: levels of every group, a database of them, evolution."""

from prunekit.search.search import Search

__all__ = ["Search"]
