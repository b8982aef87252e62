"""prunekit: structured pruning of large language models, and of any `nn.Module`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.checkpoint import from_pretrained, save_pretrained
    from prunekit.checkpoint.plain import load, save
    from prunekit.checkpoint.register import register_with_transformers
    from prunekit.errors import PrunekitError
    from prunekit.graph import CoupledGroup, CouplingGraph, Member, trace
    from prunekit.jobs.api import Recovered, evaluate, export, prune_checkpoint, recover
    from prunekit.jobs.vocabulary import PrunedVocabulary, prune_vocabulary
    from prunekit.pipeline import Result, prune
    from prunekit.plan import PruningPlan
    from prunekit.report import Report
    from prunekit.surgery import apply_plan

# Public name → the module that holds it; it is imported when the name is first asked for.
_PUBLIC = {
    "CoupledGroup": "graph",
    "CouplingGraph": "graph",
    "Member": "graph",
    "PrunedVocabulary": "jobs.vocabulary",
    "PrunekitError": "errors",
    "PruningPlan": "plan",
    "Recovered": "jobs.api",
    "Report": "report",
    "Result": "pipeline",
    "apply_plan": "surgery",
    "evaluate": "jobs.api",
    "export": "jobs.api",
    "from_pretrained": "checkpoint",
    "load": "checkpoint.plain",
    "prune": "pipeline",
    "prune_checkpoint": "jobs.api",
    "prune_vocabulary": "jobs.vocabulary",
    "recover": "jobs.api",
    "register_with_transformers": "checkpoint.register",
    "save": "checkpoint.plain",
    "save_pretrained": "checkpoint",
    "trace": "graph",
}
__all__ = [
    "CoupledGroup",
    "CouplingGraph",
    "Member",
    "PrunedVocabulary",
    "PrunekitError",
    "PruningPlan",
    "Recovered",
    "Report",
    "Result",
    "apply_plan",
    "evaluate",
    "export",
    "from_pretrained",
    "load",
    "prune",
    "prune_checkpoint",
    "prune_vocabulary",
    "recover",
    "register_with_transformers",
    "save",
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
