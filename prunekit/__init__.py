"""prunekit: structured pruning of large language models, and of any `nn.Module`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.checkpoint import from_pretrained, save_pretrained
    from prunekit.checkpoint.register import register_with_transformers
    from prunekit.errors import PrunekitError
    from prunekit.graph import CoupledGroup, CouplingGraph, LayerStack, Member, trace
    from prunekit.pipeline import Result, prune
    from prunekit.plan import PruningPlan
    from prunekit.surgery.check import apply_plan

_PUBLIC = {
    "CoupledGroup": "graph",
    "CouplingGraph": "graph",
    "LayerStack": "graph",
    "Member": "graph",
    "PruningPlan": "plan",
    "PrunekitError": "errors",
    "Result": "pipeline",
    "apply_plan": "surgery",
    "from_pretrained": "checkpoint",
    "prune": "pipeline",
    "register_with_transformers": "checkpoint.register",
    "save_pretrained": "checkpoint",
    "trace": "graph",
}
__all__ = [
    "CoupledGroup",
    "CouplingGraph",
    "LayerStack",
    "Member",
    "PrunekitError",
    "PruningPlan",
    "Result",
    "apply_plan",
    "from_pretrained",
    "prune",
    "register_with_transformers",
    "save_pretrained",
    "trace",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"prunekit.{_PUBLIC[name]}"), name)
    if name in ("checkpoint", "graph"):
        return import_module(f"prunekit.{name}")
    raise AttributeError(f"module 'prunekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
