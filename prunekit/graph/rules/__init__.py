"""The rules of some 300 ATen operators; importing this registers them."""

from prunekit.graph.rules import contraction, elementwise, layout, reduction, routing

__all__ = ["contraction", "elementwise", "layout", "reduction", "routing"]
