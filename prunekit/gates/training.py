"""Train gates, the weights frozen, beside low-rank updates of the weights, or with all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import mean_loss
from prunekit.calibration.gradients.state import recomputing, should_recompute
from prunekit.data.batches import Batch, count_positions, padding_mask, take_rows
from prunekit.errors import ConfigError, DataError, expect_one_of
from prunekit.gates.adapters import Adapters
from prunekit.gates.bounds import Bounds
from prunekit.gates.exchange import exchange
from prunekit.gates.folding import is_foldable
from prunekit.gates.layout import Layout
from prunekit.gates.loss import Dense, gated_loss
from prunekit.gates.places import Gate, find_places, gated
from prunekit.gates.rule import Learned, Rule
from prunekit.gates.updates import Frozen, Updates, Weights
from prunekit.graph import CouplingGraph, Group
from prunekit.runtime.console import say, track
from prunekit.runtime.modes import restoring, undisturbed
from prunekit.runtime.processes import add_up, own_part, rank, world_size
from prunekit.runtime.seeds import make_generator

Ramp = Literal["cubic", "linear"]
MakeRule = Callable[[Layout, Bounds, Tensor], Rule]
_AIMS = 50  # how often the budget is solved anew while gates are trained
_SAVED_EVERY = 5  # of these times, for a run that may be broken off
# Of torch's optimizers, these take other gradients, other shapes or a loss that they call.
_UNFIT = ("Optimizer", "LBFGS", "Muon", "SparseAdam")
OPTIMIZERS = {
    name: kind
    for name, kind in sorted(vars(torch.optim).items())
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in _UNFIT
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How gates are trained.

    Args:
        steps: updates, of one batch each; of one for each process, where there are several.
        batch_size: rows of a step at most; larger calibration batches are split.
        optimizer: the name of one of `torch.optim`, as it is there: Adam, AdamW, SGD, ….
        learning_rate: of the gates.
        temperature: of the gates, > 0: β of hard-concrete ones, τ of straight-through ones. Two
            numbers: at the first step and at the last. None: 2/3 for β, 1 for τ.
        temperature_ramp: how it goes from one to the other: linear, or cubic (fast at first).
        ramp: how the share to remove rises: linear, or cubic, 1 − (1 − t)³ (fast at first).
        reach: the share of the steps after which the target is asked for.
        plain: weight of the next-token loss.
        kl: weight of KL(dense ‖ gated) on the logits.
        holdout: the share of the batches that gates are judged on and not trained with; at least
            one batch, where there are several.
        evaluations: how often they are judged once the target is asked for; the best are taken.
        exchanges: after training, so many pairs of units of the same group, one that stays and one
            that goes, are judged changed, the nearest to the border first, and stay so where the
            loss falls; 0: none.
        patience: stop after so many evaluations without a better one; None: never.
        checkpointing: recompute layers in the backward pass instead of keeping their activations.
            None: where memory is short.
        rank: of updates of the weights, trained beside the gates; 0: the weights are frozen.
        merge: these updates only go into the weights; where false, a LoRA recovery takes them out
            again, as its adapters, and goes on training them.
        all_weights: train the weights themselves beside the gates.
        update_rate: the learning rate of these updates, or of all weights.
        seed: of the order of batches, and of what is drawn.

    Raises:
        ConfigError: an option out of range.
    """

    steps: int = 200
    batch_size: int = 4
    optimizer: str = "Adam"
    learning_rate: float = 0.1
    temperature: float | Sequence[float] | None = None
    temperature_ramp: Ramp = "linear"
    ramp: Ramp = "cubic"
    reach: float = 0.5
    plain: float = 0.0
    kl: float = 1.0
    holdout: float = 0.125
    evaluations: int = 10
    exchanges: int = 0
    patience: int | None = None
    checkpointing: bool | None = None
    rank: int = 0
    merge: bool = True
    all_weights: bool = False
    update_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("ramp", "temperature_ramp"):
            expect_one_of(f"importance.train.{key}", getattr(self, key), get_args(Ramp))
        expect_one_of("importance.train.optimizer", self.optimizer, list(OPTIMIZERS))
        counts: dict[str, int | None] = {"steps": self.steps, "batch_size": self.batch_size}
        counts |= {"evaluations": self.evaluations, "patience": self.patience}
        for key, value in counts.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(
                    f"importance.train.{key}: expected a whole number ≥ 1, got {value!r}"
                )
        for key, count in (("rank", self.rank), ("exchanges", self.exchanges)):
            if type(count) is not int or count < 0:
                raise ConfigError(
                    f"importance.train.{key}: expected a whole number ≥ 0, got {count!r}"
                )
        self._check_flags()
        self._check_temperature()
        numbers = {"learning_rate": self.learning_rate, "plain": self.plain, "kl": self.kl}
        numbers["update_rate"] = self.update_rate
        for key, number in numbers.items():
            if isinstance(number, str) or not 0 <= number < math.inf:
                raise ConfigError(f"importance.train.{key}: expected a number ≥ 0, got {number!r}")
        if not self.learning_rate or not self.plain + self.kl:
            raise ConfigError(
                "importance.train: expected learning_rate > 0, and plain or kl > 0, got "
                f"{self.learning_rate:g}, {self.plain:g} and {self.kl:g}"
            )
        for key, share in (("reach", self.reach), ("holdout", self.holdout)):
            if isinstance(share, str) or not 0 <= share < 1:
                raise ConfigError(f"importance.train.{key}: expected a share < 1, got {share!r}")

    def _check_flags(self) -> None:
        """Raise ConfigError where what is trained beside the gates does not go together."""
        if not isinstance(self.all_weights, bool) or (self.all_weights and self.rank):
            raise ConfigError(
                "importance.train.all_weights: expected true or false, and true only with rank=0, "
                f"got {self.all_weights!r} with rank={self.rank}"
            )
        if not isinstance(self.merge, bool) or not (self.merge or self.rank):
            raise ConfigError(
                "importance.train.merge: expected true or false, and false only with rank > 0, "
                f"got {self.merge!r} with rank={self.rank}"
            )

    def _check_temperature(self) -> None:
        """Raise ConfigError where the temperature is neither a number above 0 nor two of them."""
        ends = self._temperatures()
        sound = [type(end) in (int, float) and 0 < end < math.inf for end in ends]
        if len(ends) != 2 or not all(sound):
            raise ConfigError(
                "importance.train.temperature: expected a number > 0, or two of them, got "
                f"{self.temperature!r}"
            )

    def progress(self, step: int) -> float:
        """The share in (0, 1] of the way to the target that is asked for at a step from 0."""
        return _climb(self.ramp, min((step + 1) / max(self.reach * self.steps, 1), 1.0))

    def temperature_at(self, step: int, default: float) -> float:
        """The temperature of a step from 0; where none is set, the default."""
        if self.temperature is None:
            return default
        start, end = self._temperatures()
        return start + (end - start) * _climb(self.temperature_ramp, step / max(self.steps - 1, 1))

    def _temperatures(self) -> Sequence[float]:
        """The first and the last."""
        given = 1.0 if self.temperature is None else self.temperature
        return given if isinstance(given, Sequence) else (given, given)

    @property
    def first_judged(self) -> int:
        """The first step at which the whole target is asked for."""
        return next(step for step in range(self.steps) if self.progress(step) == 1)


def _climb(ramp: Ramp, done: float) -> float:
    """How far a ramp has come, of 1, after this share of its way."""
    return done if ramp == "linear" else 1 - (1 - done) ** 3


def learn(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    bounds: Bounds,
    make_rule: MakeRule,
    training: Training,
) -> Learned:
    """Learn the gates of all units of these groups; the model is left as it was.

    Args:
        model: the model, in memory.
        graph: its coupling graph.
        groups: the groups whose units get gates.
        batches: the texts, keyword arguments of forward calls.
        bounds: what the choice must keep to.
        make_rule: makes the rule from a layout, the bounds and first importances.
        training: how.

    Raises:
        ConfigError: a group that gates can't be put on.
        DataError: no text; a model without the loss that is asked for; a loss that is not finite.
    """
    parts = (part for batch in batches for part in _split(batch, training.batch_size))
    batches = [part for part in parts if _has_targets(part)]
    if not batches:
        raise DataError(
            "calibration: expected texts of two tokens or more to train gates with, got none"
        )
    gates, saved = find_places(model, graph, groups), _load_saved(bounds)
    foldable = [group.name for group in groups if is_foldable(group, graph)]
    layout = Layout(groups, next(model.parameters()).device, foldable)
    with undisturbed(model):
        recompute = training.checkpointing
        if recompute is None:
            ones = layout.join(dict.fromkeys(layout.names, 1.0)).requires_grad_()
            with gated(gates, layout.split(ones)):
                recompute = should_recompute(model, batches)
        with recomputing(model, recompute):
            if saved:  # the parameters are there, and need no importances to begin with
                first = layout.join(dict.fromkeys(layout.names, 1.0))
            else:
                first = _measure_first(model, gates, layout, batches)
            rule, updates = make_rule(layout, bounds, first), _start_updates(model, training)
            with restoring(updates.remove):
                trainer = _Trainer(model, gates, batches, rule, training, updates)
                return trainer.run(saved)


def _start_updates(model: nn.Module, training: Training) -> Updates:
    """What is trained beside the gates."""
    if training.all_weights:
        return Weights(model)
    return Adapters(model, training.rank, training.seed) if training.rank else Frozen()


def _split(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of at most so many rows."""
    rows, _ = count_positions(batch)
    if rows <= size:
        return [batch]
    return [take_rows(batch, range(i, min(i + size, rows))) for i in range(0, rows, size)]


def _has_targets(batch: Batch) -> bool:
    """Whether a token of the batch follows another one; true where it holds no tokens."""
    ids, mask = batch.get("input_ids"), padding_mask(batch)
    if not isinstance(ids, Tensor) or "labels" in batch:
        return True
    return ids.shape[1] > 1 if mask is None else bool((mask[:, 1:] & mask[:, :-1]).any())


def _load_saved(bounds: Bounds) -> dict[str, Tensor]:
    """What a run kept before it was broken off; empty where it kept nothing."""
    keeper, name = bounds.keeper, f"{bounds.name}/training"
    return keeper.load_tensors(name) if keeper and keeper.has_tensors(name) else {}


def _measure_first(
    model: nn.Module, gates: Sequence[Gate], layout: Layout, batches: Sequence[Batch]
) -> Tensor:
    """Σ over batches of (∂L/∂z)² at gates of 1 [U]: a coarse Fisher information of each gate."""
    total, own = layout.join(dict.fromkeys(layout.names, 0.0)), own_part(batches)
    for batch in track(own, "first importances of gates", len(own)):
        values = torch.ones_like(total, requires_grad=True)
        with gated(gates, layout.split(values)):
            mean_loss(model, batch).value.backward()
        assert values.grad is not None
        total += values.grad.square()
    add_up(total)
    if not total.isfinite().all():
        raise DataError("calibration: the gradients of gates hold NaN or infinity")
    return total


@dataclass(eq=False)
class _Trainer:
    """The loop: its state is the rule's parameters, the optimizer, and the best gates so far."""

    model: nn.Module
    gates: Sequence[Gate]
    batches: Sequence[Batch]
    rule: Rule
    training: Training
    updates: Updates
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0

    def __post_init__(self) -> None:
        held = max(round(self.training.holdout * len(self.batches)), len(self.batches) > 1)
        held = held if self.training.holdout else 0
        self.train = range(len(self.batches) - held)
        self.held = range(len(self.batches) - held, len(self.batches)) or self.train
        self.dense = Dense(self.model, self.batches)
        self.gates = self.updates.follow(self.gates)
        self.parameters = self.rule.parameters | self.updates.parameters
        groups = [
            {"params": list(self.rule.parameters.values()), "lr": self.training.learning_rate},
            {"params": list(self.updates.parameters.values()), "lr": self.training.update_rate},
        ]
        kind: Any = OPTIMIZERS[self.training.optimizer]
        self.optimizer = kind([group for group in groups if group["params"]])

    def run(self, saved: Mapping[str, Tensor]) -> Learned:
        """Train, from the beginning or from what was saved; the best that was learned."""
        training, start = self.training, self._restore(saved) if saved else 0
        default = self.rule.temperature
        aims = max(training.steps // _AIMS, 1)
        judged = self._judged_steps()
        for step in track(range(start, training.steps), "training gates", training.steps - start):
            self.rule.temperature = training.temperature_at(step, default)
            if step % aims == 0 or step == training.first_judged:
                self.rule.aim(training.progress(step))
            self._update(step)
            if step in judged:
                self.rule.aim(1.0)
                self._judge(step)
                if training.patience is not None and self.stale >= training.patience:
                    say(f"gates: step {step + 1} is the last, no better for {self.stale} times")
                    break
            # Only before steps that settle the aim anew, so that a resumed run does the same.
            if (step + 1) % (_SAVED_EVERY * aims) == 0:
                self._save(step + 1)
        self.rule.check()
        with torch.no_grad():
            for name, value in self.best.items():
                self.parameters[name].copy_(value)
        self.rule.temperature = training.temperature_at(self.best_step, default)
        self.rule.aim(1.0)
        if training.exchanges:
            count = exchange(self.rule, lambda: self._held_out()[0], training.exchanges)
            say(f"gates: {count} of {training.exchanges} exchanges of units lower the loss")
        return replace(self.rule.learned(), updates=self.updates.learned())

    def _save(self, step: int) -> None:
        """Keep what the steps from this one on depend on, where the run keeps a state."""
        bounds = self.rule.bounds
        if bounds.keeper is None:
            return
        tensors = {"counts": torch.tensor([step, self.stale, self.best_step])}
        tensors["best_loss"] = torch.tensor(self.best_loss, dtype=torch.float64)
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"extra.{name}": value for name, value in self.rule.extras.items()}
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        copies = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        bounds.keeper.save_tensors(f"{bounds.name}/training", copies)

    @torch.no_grad()
    def _restore(self, saved: Mapping[str, Tensor]) -> int:
        """Take up what was saved; the step to go on with."""
        step, self.stale, self.best_step = saved["counts"].tolist()
        self.best_loss = float(saved["best_loss"])
        for name, parameter in self.parameters.items():
            parameter.copy_(saved[f"parameter.{name}"])
            own = f"optimizer.{name}."
            keys = {key.removeprefix(own): key for key in saved if key.startswith(own)}
            self.optimizer.state[parameter] = {
                part: saved[key] if part == "step" else saved[key].to(parameter)
                for part, key in keys.items()
            }
            if f"best.{name}" in saved:
                self.best[name] = saved[f"best.{name}"].to(parameter)
        for name, value in self.rule.extras.items():
            value.copy_(saved[f"extra.{name}"])
        say(f"gates: going on with step {step + 1}")
        return int(step)

    def _judged_steps(self) -> set[int]:
        """The steps after which gates are judged, evenly spread; the last one always."""
        first, last = self.training.first_judged, self.training.steps - 1
        count = self.training.evaluations
        return {last - round(i * (last - first) / count) for i in range(count)}

    def _update(self, step: int) -> None:
        """One step of the optimizer on one batch."""
        number = self._order(step)
        generator = make_generator(self.training.seed, f"draw {step}")
        uniform = torch.rand(self.rule.draws, generator=generator).clamp_(1e-6, 1 - 1e-6)
        uniform = uniform.to(self.rule.layout.device)
        heat = 1 - step / max(self.training.steps - 1, 1)
        self.optimizer.zero_grad()
        dense = self._dense_logits(number)
        with self._open(self.rule.sample(uniform, heat)):
            (loss, _), penalty = self._loss(number, dense), self.rule.penalty()
            (loss if penalty is None else loss + penalty.to(loss.device)).backward()
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                add_up(parameter.grad.div_(world_size()))
        self.rule.correct_gradients()
        self.optimizer.step()

    def _order(self, step: int) -> int:
        """The number of the batch of a step: each pass goes through them in an order of its own.

        Of several processes, each takes the next one.
        """
        epoch, place = divmod(step * world_size() + rank(), len(self.train))
        generator = make_generator(self.training.seed, f"order {epoch}")
        return int(torch.randperm(len(self.train), generator=generator)[place])

    @contextmanager
    def _open(self, values: Tensor) -> Iterator[None]:
        """The model with these gates [U], and with the updates of its weights."""
        with self.updates.attached(), gated(self.gates, self.rule.layout.split(values)):
            yield

    def _dense_logits(self, number: int) -> Tensor | None:
        """What the dense model says of a batch, where the loss needs it: no gates may be on."""
        return self.dense.logits(number) if self.training.kl else None

    def _loss(self, number: int, dense: Tensor | None) -> tuple[Tensor, Tensor | None]:
        training = self.training
        return gated_loss(self.model, self.batches[number], dense, training.plain, training.kl)

    @torch.no_grad()
    def _held_out(self) -> tuple[float, float]:
        """The held-out loss of the gates as the cut would leave them, and that of next tokens."""
        values, losses = self.rule.settled(), [torch.zeros(2, device=self.rule.layout.device)]
        for number in own_part(self.held):
            dense = self._dense_logits(number)
            with self._open(values):
                loss, own = self._loss(number, dense)
                losses.append(torch.stack([loss, loss if own is None else own]).to(losses[0]))
        total = add_up(torch.stack(losses).sum(0)) / len(self.held)
        return total[0].item(), total[1].item()

    def _judge(self, step: int) -> None:
        """Compare the gates, as the cut would leave them, with the best so far."""
        loss, own = self._held_out()
        if not math.isfinite(loss):
            raise DataError(f"gates: the loss at step {step + 1} is {loss}")
        tokens = "input_ids" in self.batches[0]
        perplexity = f", perplexity {math.exp(min(own, 100)):.4g}" if tokens else ""
        say(f"gates: step {step + 1}, held-out loss {loss:.4f}{perplexity}{self.rule.describe()}")
        self.stale += 1
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.stale = loss, step, 0
            self.best = {n: p.detach().clone() for n, p in self.parameters.items()}
