"""The sections of the configuration as typed dataclasses; each checks its own values.

A value that can't be meant raises a ConfigError of one line, which names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from prunekit.errors import ConfigError, expect_one_of

TASKS = ("prune", "trace", "evaluate", "recover", "export", "diff", "search", "tokens")
SHAPES = ("aligned", "free", "uniform")
MEASURES = ("parameters", "bytes", "flops", "latency")
LIMITS = (*MEASURES, "limit")
BLOCK = ("attention", "mlp")
SINGLE = ("attention", "query_head", "mlp", "channel", "expert", "head_dim", "latent", "layer")
# A number of target_shape → the kind of the units that it counts.
SHAPE_KINDS = {"layers": "layer", "heads": "attention", "ffn": "mlp", "hidden": "channel"}
VOCABULARY = "vocabulary"  # tokens, which go by what texts need, before anything else is cut
# A choice of `groups` → the kinds of groups that it stands for.
KINDS: dict[str, tuple[str, ...]] = {
    "block": BLOCK,
    **{kind: (kind,) for kind in SINGLE},
    "tower": BLOCK,
    "auto": BLOCK,
    "independent": BLOCK,
    VOCABULARY: (),
}


def _check_least(section: str, values: Mapping[str, int | None], least: int) -> None:
    """Raise ConfigError for a number below `least`; None is a number that was not given."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"{section}.{name}: expected a whole number ≥ {least}, got {value}")


@dataclass
class ModelConfig:
    """Which model: a folder, a GGUF file or a name on the hub (None: the embedded model)."""

    path: str | None = None
    trust_remote_code: bool = False
    dequantize: bool = False


@dataclass
class CalibrationConfig:
    """Which text the method is calibrated on, and how much of it."""

    corpus: str = "embedded"
    path: str | None = None
    mix: dict[str, float] | None = None
    samples: int = 128
    sequence_length: int = 128
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Raise ConfigError for a number out of range."""
        counts: dict[str, int | None] = {"samples": self.samples, "batch_size": self.batch_size}
        _check_least("data.calibration", counts, 1)
        _check_least("data.calibration", {"sequence_length": self.sequence_length}, 2)
        if self.mix and self.path:
            raise ConfigError("data.calibration: expected path or mix, whose names may be paths")
        for name, share in (self.mix or {}).items():
            if not 0 < share < float("inf"):
                raise ConfigError(f"data.calibration.mix: {name}: expected > 0, got {share:g}")
        if none := [name for name, count in self.samples_by_corpus().items() if not count]:
            raise ConfigError(
                f"data.calibration.mix: no sample of {self.samples} is left for {none[0]}; "
                "expected a higher share or more samples"
            )

    def samples_by_corpus(self) -> dict[str, int]:
        """Corpus, a name or a path → how many samples come from it, by largest remainders."""
        shares = self.mix or {self.path or self.corpus: 1.0}
        exact = {name: self.samples * s / sum(shares.values()) for name, s in shares.items()}
        counts = {name: int(number) for name, number in exact.items()}
        by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
        for name in by_remainder[: self.samples - sum(counts.values())]:
            counts[name] += 1
        return counts


@dataclass
class DataConfig:
    """The data that a method needs."""

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)


@dataclass
class VocabularyConfig:
    """Which texts tell the tokens that stay (none: the calibration corpus), and how many stay."""

    corpora: list[str] = field(default_factory=list)
    min_count: int = 1
    multiple: int = 64

    def __post_init__(self) -> None:
        """Raise ConfigError for a number out of range."""
        _check_least("vocabulary", {"min_count": self.min_count, "multiple": self.multiple}, 1)


@dataclass
class TargetConfig:
    """What the pruned model may cost, instead of `ratio`: one of the first five.

    Each of the first four selects the cost of its name; `limit` is in the units of the configured
    cost. FLOPs and latency are those of a forward pass on `batch` rows of `tokens` tokens.
    """

    parameters: float | None = None
    bytes: float | None = None
    flops: float | None = None
    latency: float | None = None
    limit: float | None = None
    tokens: int = 64
    batch: int = 1

    def __post_init__(self) -> None:
        """Raise ConfigError for two measures at once, or a number out of range."""
        if len(self.given) > 1:
            names = ", ".join(LIMITS)
            raise ConfigError(f"target: expected one of {names}, got {' and '.join(self.given)}")
        for name, value in self.given.items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"target.{name}: expected a number > 0, got {value:g}")
        _check_least("target", {"tokens": self.tokens}, 2)
        _check_least("target", {"batch": self.batch}, 1)

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by name; one at most, once the section is checked."""
        values = {name: getattr(self, name) for name in LIMITS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def measure(self) -> str | None:
        """The measure that a limit is given in by its name, if one is."""
        return next((name for name in self.given if name in MEASURES), None)


@dataclass
class ShapeConfig:
    """How many units stay, instead of `ratio`: of the model, of each layer, of the hidden states.

    Heads are KV heads, with their query heads. None: units of this kind stay as they are.
    """

    layers: int | None = None
    heads: int | None = None
    ffn: int | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a number below 1."""
        _check_least("target_shape", self.given, 1)

    @property
    def given(self) -> dict[str, int]:
        """The numbers that are set, by name."""
        values = {name: getattr(self, name) for name in SHAPE_KINDS}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class MemoryConfig:
    """Where activations wait between passes, and whether layers come from disk one by one.

    `budget` and `host` are bytes, on the device and in pinned memory beside it.
    """

    budget: float | None = None
    host: float | None = None
    folder: str | None = None
    stream: Any = "auto"

    def __post_init__(self) -> None:
        """Raise ConfigError for a number out of range, or an unknown way of streaming."""
        if not (isinstance(self.stream, bool) or self.stream == "auto"):
            raise ConfigError(f"memory.stream: expected true, false or auto, got {self.stream!r}")
        for name, value in (("budget", self.budget), ("host", self.host)):
            if value is not None and not value >= 0:
                raise ConfigError(f"memory.{name}: expected a number of bytes ≥ 0, got {value:g}")


@dataclass
class LatencyConfig:
    """What tokens/s are measured on: rows, tokens of the prompt, new tokens; and how often."""

    batch: int = 1
    prompt: int = 128
    new: int = 32
    repeats: int = 5

    def __post_init__(self) -> None:
        """Raise ConfigError for a number out of range."""
        _check_least("eval.latency", vars(self), 1)


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

    def __post_init__(self) -> None:
        """Raise ConfigError for a number out of range."""
        batch = self.batch_size
        counted = isinstance(batch, int) and not isinstance(batch, bool) and batch > 0
        if batch != "auto" and not counted:
            raise ConfigError(f"eval.batch_size: expected a whole number ≥ 1 or auto, got {batch}")
        if self.cache is not None and not isinstance(self.cache, str):
            raise ConfigError(f"eval.cache: expected a folder, auto or null, got {self.cache!r}")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            came = f"{self.temperature:g} and {self.top_p:g}"
            raise ConfigError(f"eval: expected temperature ≥ 0 and top_p in (0, 1], got {came}")
        _check_least("eval", {"window": self.window, "max_tokens": self.max_tokens}, 2)
        counts = {"task_limit": self.task_limit, "stride": self.stride}
        _check_least("eval", {**counts, "new_tokens": self.new_tokens}, 1)
        counts = {"layer_tokens": self.layer_tokens, "macs": self.macs, "fewshot": self.fewshot}
        _check_least("eval", counts, 0)


@dataclass
class RunConfig:
    """The composed configuration; groups with a `_target_` are checked by the class they name."""

    task: str = "prune"
    plans: list[str] = field(default_factory=list)
    ratio: float = 0.2
    target: TargetConfig = field(default_factory=TargetConfig)
    target_shape: ShapeConfig = field(default_factory=ShapeConfig)
    groups: Any = "block"
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    shapes: str = "aligned"
    seed: int = 0
    output_dir: str = MISSING
    resume: bool = False
    objective: Any = "perplexity"
    device: str = "auto"
    dtype: str = "auto"
    imports: list[str] = field(default_factory=list)
    method_name: str = "slimgpt"
    default_data: str | None = None
    corpora: dict[str, dict[str, Any]] = field(default_factory=dict)
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

    def __post_init__(self) -> None:
        """Raise ConfigError for an unknown choice, or a ratio out of range."""
        choices = [("task", self.task, TASKS), ("shapes", self.shapes, SHAPES)]
        kinds = [("groups", kind, tuple(KINDS)) for kind in kinds_of(self.groups)]
        if not kinds:
            raise ConfigError(f"groups: expected one or more of {', '.join(KINDS)}, got none")
        for key, choice, known in [*choices, *kinds]:
            expect_one_of(key, choice, known, "choice ")
        if not 0 < self.ratio < 1:
            raise ConfigError(f"ratio: expected a number in (0, 1), got {self.ratio:g}")
        if self.target.given and self.target_shape.given:
            raise ConfigError("target_shape: expected it without target, got both")


def kinds_of(groups: str | list[str] | tuple[str, ...]) -> list[str]:
    """The choices that `groups` names, one or a list."""
    return [str(kind) for kind in groups] if isinstance(groups, list | tuple) else [str(groups)]
