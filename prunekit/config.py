"""Find `conf/`, compose it with Hydra, and check it against typed dataclasses before anything heavy
is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from prunekit.errors import ConfigError, PrunekitError, suggest

GROUPS = (
    "model",
    "data",
    "importance",
    "policy",
    "scope",
    "cost",
    "compensation",
    "schedule",
    "recovery",
    "eval",
    "export",
    "method",
    "experiment",
)
TASKS = ("prune", "trace", "evaluate", "recover", "export", "diff")
BLOCK = ("attention", "mlp")
SINGLE = ("attention", "query_head", "mlp", "channel", "expert", "head_dim", "layer")
KINDS = {"block": BLOCK, **{kind: (kind,) for kind in SINGLE}, "independent": BLOCK}


@dataclass
class ModelConfig:
    """Which model."""

    path: str | None = None
    trust_remote_code: bool = False


@dataclass
class CalibrationConfig:
    """Which text, how much of it."""

    corpus: str = "embedded"
    path: str | None = None
    samples: int = 128
    sequence_length: int = 128
    seed: int = 0
    batch_size: int = 16


@dataclass
class DataConfig:
    """The data a method needs."""

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)


@dataclass
class TargetConfig:
    """What the pruned model may come to, instead of `ratio`; `tokens` × `batch` is what FLOPs and
    latency are for.

    `limit` is in the units of the configured cost; each of the first four selects its own cost.
    """

    parameters: float | None = None
    bytes: float | None = None
    flops: float | None = None
    latency: float | None = None
    limit: float | None = None
    tokens: int = 64
    batch: int = 1

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by name; one at most, once the configuration is checked."""
        values = {name: getattr(self, name) for name in LIMITS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def measure(self) -> str | None:
        """The measure that a limit is given in by its name, if one is."""
        return next((name for name in self.given if name in MEASURES), None)


@dataclass
class MemoryConfig:
    """Where activations wait between passes (bytes), and whether layers come from disk one by one."""

    budget: float | None = None
    host: float | None = None
    folder: str | None = None
    stream: Any = "auto"


SHAPES = ("free", "uniform", "aligned")
MEASURES = ("parameters", "bytes", "flops", "latency")
LIMITS = (*MEASURES, "limit")


@dataclass
class LatencyConfig:
    """What tokens/s are measured on."""

    batch: int = 1
    prompt: int = 128
    new: int = 32
    repeats: int = 5


@dataclass
class EvalConfig:
    """What is measured of every model: dense, pruned, recovered."""

    corpora: list[str] = field(default_factory=list)
    window: int = 128
    stride: int | None = None
    batch_size: Any = "auto"
    max_tokens: int | None = None
    tasks: list[str] = field(default_factory=list)
    tasks_dir: str | None = None
    task_limit: int | None = None
    fewshot: int | None = None
    prompts: list[str] = field(default_factory=list)
    new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 0.95
    layer_tokens: int = 1024
    macs: int = 64
    speed: bool = True
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    cache: Any = "auto"
    baseline: str | None = None


@dataclass
class RunConfig:
    """The composed configuration; groups with a `_target_` are checked by the class they name."""

    task: str = "prune"
    plans: list[str] = field(default_factory=list)
    ratio: float = 0.2
    target: TargetConfig = field(default_factory=TargetConfig)
    groups: Any = "block"
    shapes: str = "free"
    seed: int = 0
    output_dir: str = MISSING
    resume: bool = False
    device: str = "auto"
    dtype: str = "auto"
    method_name: str = "slimgpt"
    corpora: dict[str, Any] = field(default_factory=dict)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    importance: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    scope: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    compensation: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: dict[str, Any] = field(default_factory=dict)


def config_dir() -> Path:
    """The folder of the configuration: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def compose(overrides: list[str]) -> DictConfig:
    """The configuration the command line would compose from these overrides.

    Raises:
        ConfigError: an unknown key or choice, a value of the wrong type.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    check_choices(overrides)
    running = GlobalHydra.instance().is_initialized()
    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra.compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    finally:
        if running:
            GlobalHydra.instance().hydra = state


def check_choices(overrides: list[str]) -> None:
    """Raise ConfigError where an override names a choice its group doesn't have."""
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if override.startswith("-") or not (value or override.startswith("~")):
            continue  # a flag, or a flag's value
        known = {*GROUPS, "hydra", *(f.name for f in fields(RunConfig))}
        if (first := key.split(".")[0].split("/")[0].split("@")[0]) not in known:
            raise ConfigError(f"unknown key {first!r}: {suggest(first, sorted(known))}")
        if key not in GROUPS or not value:
            continue
        available = sorted(path.stem for path in (config_dir() / key).glob("*.yaml"))
        for choice in value.strip("\"'").split(","):
            if choice.strip() not in [*available, "null", "choice()"] and "(" not in choice:
                raise ConfigError(
                    f"{key}: unknown choice {choice.strip()!r}: {suggest(choice.strip(), available)}"
                )


def one_line(error: BaseException) -> str:
    """What a Hydra or OmegaConf error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__ if error.__cause__ is not error else None
    text = "; ".join(lines[:2]).replace("Could not override", "can't set")
    return (
        f"{text}: {str(cause).splitlines()[0]}"
        if cause and str(cause) and str(cause) not in text
        else text
    )


def check(config: DictConfig) -> RunConfig:
    """The configuration as typed dataclasses; ConfigError names the key, what was expected and what
    came.
    """
    container: Any = OmegaConf.to_container(config, resolve=False)
    plain = OmegaConf.create({k: v for k, v in container.items() if k != "hydra"})
    for name in ("corpora", "tasks", "prompts"):
        if isinstance(OmegaConf.select(plain, f"eval.{name}"), str):
            plain.eval[name] = [plain.eval[name]]
    if isinstance(plain.get("plans"), str):
        plain.plans = [plain.plans]
    known = {f.name for f in fields(RunConfig)}
    if unknown := [key for key in plain if key not in known]:
        raise ConfigError(f"unknown key {unknown[0]!r}: {suggest(str(unknown[0]), sorted(known))}")
    try:
        run: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), plain))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: expected a value, e.g. {error.full_key}=…") from error
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    if run.task not in TASKS:
        raise ConfigError(f"task: unknown choice {run.task!r}: {suggest(run.task, list(TASKS))}")
    if run.shapes not in SHAPES:
        raise ConfigError(
            f"shapes: unknown choice {run.shapes!r}: {suggest(run.shapes, list(SHAPES))}"
        )
    for kind in kinds_of(run.groups):
        if kind not in KINDS:
            raise ConfigError(f"groups: unknown choice {kind!r}: {suggest(kind, list(KINDS))}")
    given = run.target.given
    if len(given) > 1:
        raise ConfigError(f"target: expected one of {', '.join(LIMITS)}, got {' and '.join(given)}")
    for name, value in given.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"target.{name}: expected a number > 0, got {value:g}")
    if not 0 < run.ratio < 1:
        raise ConfigError(f"ratio: expected a number in (0, 1), got {run.ratio:g}")
    if not (isinstance(run.memory.stream, bool) or run.memory.stream == "auto"):
        raise ConfigError(f"memory.stream: expected true, false or auto, got {run.memory.stream!r}")
    if run.eval.batch_size != "auto" and not (
        isinstance(run.eval.batch_size, int) and run.eval.batch_size > 0
    ):
        raise ConfigError(
            f"eval.batch_size: expected a whole number ≥ 1 or auto, got {run.eval.batch_size}"
        )
    if not (run.eval.temperature >= 0 and 0 < run.eval.top_p <= 1):
        came = f"{run.eval.temperature:g} and {run.eval.top_p:g}"
        raise ConfigError(f"eval: expected temperature ≥ 0 and top_p in (0, 1], got {came}")
    for name, value in (("budget", run.memory.budget), ("host", run.memory.host)):
        if value is not None and not value >= 0:
            raise ConfigError(f"memory.{name}: expected a number of bytes ≥ 0, got {value:g}")
    for key, value, least in (
        ("target.tokens", run.target.tokens, 2),
        ("target.batch", run.target.batch, 1),
        ("eval.window", run.eval.window, 2),
        ("eval.stride", 1 if run.eval.stride is None else run.eval.stride, 1),
        ("eval.task_limit", 1 if run.eval.task_limit is None else run.eval.task_limit, 1),
        ("eval.fewshot", run.eval.fewshot or 0, 0),
        ("eval.layer_tokens", run.eval.layer_tokens, 0),
        ("eval.macs", run.eval.macs, 0),
        *((f"eval.latency.{name}", value, 1) for name, value in vars(run.eval.latency).items()),
        ("eval.max_tokens", 2 if run.eval.max_tokens is None else run.eval.max_tokens, 2),
        ("eval.new_tokens", run.eval.new_tokens, 1),
        ("data.calibration.samples", run.data.calibration.samples, 1),
        ("data.calibration.sequence_length", run.data.calibration.sequence_length, 2),
        ("data.calibration.batch_size", run.data.calibration.batch_size, 1),
    ):
        if value < least:
            raise ConfigError(f"{key}: expected a whole number ≥ {least}, got {value}")
    return run


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value."""
    if not isinstance(section, dict):
        return {prefix: section}
    parts = [
        flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in section.items()
    ]
    return {key: value for part in parts for key, value in part.items()}


def kinds_of(groups: Any) -> list[str]:
    """The choices that `groups` names, one or a list."""
    return [str(kind) for kind in groups] if isinstance(groups, list | tuple) else [str(groups)]


def build(section: dict[str, Any], name: str) -> Any:
    """The object a config group's `_target_` names, or None; ConfigError where its arguments don't
    fit.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if section.get("_target_") is None:
        return None
    try:
        return instantiate(section, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, PrunekitError):
            raise error.__cause__ from None
        raise ConfigError(f"{name}: {one_line(error)}") from error
