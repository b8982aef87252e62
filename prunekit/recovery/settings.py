"""What the configuration of a recovery says: `conf/recovery/*.yaml` names this class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunekit.errors import ConfigError, expect_one_of

FORMATS = ("auto", "alpaca", "text")
SCHEDULES = ("cosine", "linear")
TARGETS = ("all", "mlp", "attention")
VALIDATION = "validation"
# Whole numbers, and the least that each may be.
_LEAST = {
    "length": 2,
    "batch_size": 1,
    "micro_batch": 1,
    "rank": 1,
    "samples": 1,
    "patience": 1,
    "warmup_steps": 0,
    "evaluations": 0,
    "checkpoints": 0,
    "seed": 0,
}
_OPTIONAL = ("samples", "patience", "seed")


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One recovery: the data, the training, the adapters, the teacher.

    Attributes:
        corpus: a name of the configuration's `corpora`, "embedded", or a path.
        path: a local file instead of the corpus.
        format: "alpaca" (instruction, input, output; the loss is on the response), "text", or
            "auto": alpaca where every record has an instruction and an output.
        join: plain text only: documents joined by blank lines and cut into rows of `length` tokens;
            where false, one document a row, cut off at `length`.
        samples: at most so many training examples (rows, for joined text), those held out not
            counted.
        length: tokens of a row.
        pack: several examples in a row; none sees another (checked before the first step).
        epochs: passes over the examples, a fraction allowed.
        batch_size: rows of one optimizer step, over all processes.
        micro_batch: rows of one forward pass; "auto" begins with at most 16 and halves when memory
            runs out.
        learning_rate: AdamW's, at its peak.
        schedule: "cosine" or "linear", down to zero at the last step.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's.
        clip: largest norm of the gradient; 0 clips nothing.
        bf16: compute in bfloat16; "auto": where a GPU has it. Else the computation is in float32,
            and half-precision weights are rounded back at the end.
        lora: train adapters; where false, the weights themselves.
        rank: of the adapters.
        alpha: the adapters are scaled by alpha / rank.
        dropout: on the adapters' inputs.
        targets: "all", "mlp" or "attention", or a list of these: the linears that get adapters
            (without LoRA: whose weights are trained; "all" is then every parameter).
        merge: fold the adapters into the weights at the end; where false they are kept in a folder.
        plain: weight of the ordinary next-token loss.
        kl: weight of KL(teacher ‖ model) on the logits.
        temperature: of both distributions in that term, which is multiplied by its square.
        hidden: weight of the hidden states' relative squared error.
        holdout: examples kept for validation: a number, or a share below 1.
        evaluations: how many times the held-out perplexities are measured during training.
        patience: stop after so many evaluations without a lower perplexity, and go back to the
            best; null: never, and the last state stays.
        stop_on: which perplexity that is: "validation", or the name of a watched corpus.
        checkpoints: steps between two states kept for resuming; 0: none.
        seed: of the order, the adapters' start and dropout; null: the run's.

    Raises:
        ConfigError: a value that can't be meant.
    """

    corpus: str = "alpaca"
    path: str | None = None
    format: str = "auto"
    join: bool = True
    samples: int | None = None
    length: int = 256
    pack: bool = False
    epochs: float = 1.0
    batch_size: int = 64
    micro_batch: int | str = "auto"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    bf16: bool | str = "auto"
    lora: bool = True
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: str | Sequence[str] = "all"
    merge: bool = True
    plain: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0
    hidden: float = 0.0
    holdout: float = 0.02
    evaluations: int = 10
    patience: int | None = None
    stop_on: str = VALIDATION
    checkpoints: int = 100
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_flags()
        self._check_whole_numbers()
        self._check_numbers()
        self._check_together()

    @property
    def kinds(self) -> tuple[str, ...]:
        """`targets` as a tuple."""
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss compares with the dense model."""
        return self.kl > 0 or self.hidden > 0

    def check_rank(self, least: int) -> None:
        """Raise ConfigError where adapters have a lower rank than those that they go on from."""
        if self.lora and self.rank < least:
            raise ConfigError(
                f"recovery.rank: expected at least importance.train.rank={least}, whose updates go "
                f"on as adapters, got {self.rank}"
            )

    def _check_choices(self) -> None:
        if not (isinstance(self.targets, str | list | tuple) and self.targets):
            raise ConfigError(
                f"recovery.targets: expected a choice of {', '.join(TARGETS)}, got {self.targets!r}"
            )
        choices = [("format", self.format, FORMATS), ("schedule", self.schedule, SCHEDULES)]
        choices += [("targets", kind, TARGETS) for kind in self.kinds]
        for key, value, known in choices:
            expect_one_of(f"recovery.{key}", value, known, "choice ")

    def _check_flags(self) -> None:
        for key in ("join", "pack", "lora", "merge"):
            if not isinstance(value := getattr(self, key), bool):
                raise ConfigError(f"recovery.{key}: expected true or false, got {value!r}")
        if not (isinstance(self.bf16, bool) or self.bf16 == "auto"):
            raise ConfigError(f"recovery.bf16: expected true, false or auto, got {self.bf16!r}")

    def _check_whole_numbers(self) -> None:
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if (value is None and key in _OPTIONAL) or (key, value) == ("micro_batch", "auto"):
                continue
            if not (type(value) is int and value >= least):
                auto = " or auto" if key == "micro_batch" else ""
                raise ConfigError(
                    f"recovery.{key}: expected a whole number ≥ {least}{auto}, got {value!r}"
                )

    def _check_numbers(self) -> None:
        for key in ("epochs", "learning_rate", "alpha", "temperature"):
            self._check_number(key, "> 0", _is_positive)
        for key in ("weight_decay", "clip", "plain", "kl", "hidden"):
            self._check_number(key, "≥ 0", _is_not_negative)
        self._check_number("dropout", "in [0, 1)", _is_share)
        self._check_number("holdout", "≥ 0, whole or below 1", _is_share_or_count)

    def _check_number(self, key: str, expected: str, fits: Callable[[float], bool]) -> None:
        value = getattr(self, key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and fits(value)):
            raise ConfigError(f"recovery.{key}: expected a number {expected}, got {value!r}")

    def _check_together(self) -> None:
        """Raise ConfigError where values do not go with each other."""
        if self.plain + self.kl + self.hidden == 0:
            raise ConfigError(
                "recovery: expected a weight > 0 in plain, kl or hidden, got 0 in all three"
            )
        if not (self.lora or self.merge):
            raise ConfigError(
                "recovery.merge: expected true without adapters (recovery.lora=false), got false"
            )
        if isinstance(self.micro_batch, int) and self.batch_size % self.micro_batch:
            raise ConfigError(
                "recovery.micro_batch: expected a divisor of "
                f"recovery.batch_size={self.batch_size}, got {self.micro_batch}"
            )
        if self.patience is None:
            return
        for key in ("evaluations", "holdout") if self.stop_on == VALIDATION else ("evaluations",):
            if not getattr(self, key):
                raise ConfigError(
                    f"recovery.{key}: expected more than 0 with recovery.patience, got 0"
                )


def _is_positive(value: float) -> bool:
    return value > 0


def _is_not_negative(value: float) -> bool:
    return value >= 0


def _is_share(value: float) -> bool:
    return 0 <= value < 1


def _is_share_or_count(value: float) -> bool:
    return _is_share(value) or (value >= 1 and value == int(value))
