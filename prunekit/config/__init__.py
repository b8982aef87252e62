"""The configuration: its sections, how it is composed and checked, the objects that it names."""

from prunekit.config.build import build, build_as, import_modules
from prunekit.config.calls import (
    CALLS,
    EVALUATE,
    EXPORT,
    PRUNE,
    PRUNE_CHECKPOINT,
    RECOVER,
    ApiCall,
)
from prunekit.config.compose import check, compose, config_dir, flat, settle
from prunekit.config.overrides import (
    BUILT,
    GROUPS,
    check_acted_on,
    check_choices,
    one_line,
    split_overrides,
)
from prunekit.config.sections import (
    KINDS,
    SHAPE_KINDS,
    VOCABULARY,
    EvalConfig,
    RunConfig,
    ShapeConfig,
    TargetConfig,
    kinds_of,
)

__all__ = [
    "CALLS",
    "EVALUATE",
    "EXPORT",
    "PRUNE",
    "PRUNE_CHECKPOINT",
    "RECOVER",
    "ApiCall",
    "BUILT",
    "EvalConfig",
    "GROUPS",
    "KINDS",
    "RunConfig",
    "SHAPE_KINDS",
    "ShapeConfig",
    "TargetConfig",
    "VOCABULARY",
    "build",
    "build_as",
    "check",
    "check_acted_on",
    "check_choices",
    "compose",
    "config_dir",
    "flat",
    "import_modules",
    "kinds_of",
    "one_line",
    "settle",
    "split_overrides",
]
