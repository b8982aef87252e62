"""What a report is made of, where it has a fixed shape; `prunekit.report.record` holds the whole.

"Column" below is the name of a model in a report: dense, pruned, recovered, or model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunekit.report.plain import flat_field


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The share of all parameters that was removed.

    Attributes:
        target: what was asked for, in (0, 1); null where the target was another measure.
        achieved: what was removed.
    """

    target: float | None
    achieved: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """A target other than a ratio of parameters, in units of its measure.

    Attributes:
        measure: parameters, bytes, flops or latency.
        limit: what the model had to come down to.
        dense: what the dense model takes.
        achieved: what the pruned model takes by the same count.
        measured: seconds of one forward pass of the pruned model; of a latency target only.
    """

    measure: str
    limit: float
    dense: float
    achieved: float
    measured: float | None = None


@dataclass(frozen=True, kw_only=True)
class LargeTokens:
    """How much of the Hessian's trace the largest tokens own, at what reads a group.

    Attributes:
        group: the group.
        permille: the share of Σ ‖x‖² over all calibration tokens that the largest 0.1 % own.
        percent: the same of the largest 1 %.
        positions: position in its sample → how many of the largest 0.1 % are there; the five most.
    """

    group: str
    permille: float
    percent: float
    positions: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """The best candidate of a search after so many evaluations.

    Attributes:
        evaluations: how many candidates of the round were judged so far.
        divergence: KL(dense ‖ candidate), mean over positions, brought to the cost of the limit.
    """

    evaluations: int
    divergence: float


@dataclass(frozen=True, kw_only=True)
class SearchRound:
    """One round of a search: a database of levels, and the candidates made of them.

    Attributes:
        step: the share of a group's units between two levels.
        database_bytes: bytes of the repaired weights of all levels.
        evaluations: how many candidates were judged.
        tokens: tokens that went through the whole model for it; half of the model counts half.
        curve: the best candidate so far.
    """

    step: float
    database_bytes: int
    evaluations: int
    tokens: int
    curve: tuple[SearchPoint, ...]


@dataclass(frozen=True, kw_only=True)
class SearchedCut:
    """A seed, or the winner of a round, cut as an ordinary run would on a part of the calibration.

    Attributes:
        fitness: KL(dense ‖ cut) on the samples that candidates were judged on.
        held_out: the same on held-out samples.
        lead: by how much the best winner's KL is lower on held-out samples.
        lead_error: the standard error of the lead, over samples.
        shares: group → the share of its units that is removed.
    """

    fitness: float
    held_out: float
    lead: float
    lead_error: float
    shares: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SearchFigures:
    """What a search for the shares tried and found.

    Attributes:
        taken: the name of the cut whose shares were taken.
        verdict: why, in a sentence.
        cuts: the seeds by their names, and the winner of each round.
        rounds: the rounds, in order.
        prices: group → KL(dense ‖ dense model with this group alone at the share it has in the
            best cut, or at the level of the last round next to it).
        evaluations: how many candidates were judged in all rounds.
        passes: the cost of judging them, in forward passes over the calibration set.
        samples: database, fitness, held_out → how many calibration samples each had.
    """

    taken: str
    verdict: str
    cuts: Mapping[str, SearchedCut]
    rounds: tuple[SearchRound, ...]
    prices: Mapping[str, float]
    evaluations: int
    passes: float
    samples: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class PolicyShares:
    """How the policy spread the ratio; beside it stands what the policy measured.

    Attributes:
        shares: group name → its share; only the proportions count.
        search: what the policy tried, if it searched.
    """

    shares: Mapping[str, float]
    search: SearchFigures | None = None
    notes: Mapping[str, object] = flat_field()


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens that went because texts don't need them; the ratio is a share of what was left.

    Attributes:
        corpora: the texts.
        text_tokens: how many tokens the texts have.
        distinct_tokens: how many different ones; special tokens and what leads to others stay too.
        tokens: column → rows of the embedding.
    """

    corpora: tuple[str, ...]
    text_tokens: int
    distinct_tokens: int
    tokens: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class KeptUnits:
    """Units of one kind in one layer.

    Attributes:
        kept: how many stayed.
        total: how many there were.
    """

    kept: int
    total: int


@dataclass(frozen=True, kw_only=True)
class LayerKept:
    """The units that one layer kept: kind of group → `KeptUnits`.

    Attributes:
        index: the layer; null for groups outside of layers, which stand by their names.
    """

    index: int | None
    kinds: Mapping[str, KeptUnits] = flat_field()


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Groups that stay whole because they can't be cut.

    Attributes:
        groups: the pattern of their names, as `scope.exclude` takes it.
        count: how many they are.
        reason: why they can't be cut.
    """

    groups: str
    count: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text that the units were chosen by.

    Attributes:
        corpus: the name of the corpus or of its file.
        samples: number of sequences.
        sequence_length: tokens of each sequence.
        seed: the seed that the sequences were drawn with.
        documents: number of documents that the sequences hold tokens of.
        distinct_tokens: number of different tokens in the sequences.
    """

    corpus: str
    samples: int
    sequence_length: int
    seed: int
    documents: int | None = None
    distinct_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One step of recovery; what was not measured at this step is left out.

    Attributes:
        step: optimizer steps so far.
        tokens: tokens trained on so far.
        loss: the training loss.
        learning_rate: the learning rate of this step.
        validation_loss: the loss on held-out examples.
        perplexity: corpus → perplexity of the model at this step.
    """

    step: int
    tokens: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    validation_loss: float | None = None
    perplexity: Mapping[str, float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class RecoveryFigures:
    """How the pruned model was fine-tuned.

    Attributes:
        curve: the logged steps, in order.
        steps: optimizer steps in all.
        stopped_early: whether patience ran out before the last step.
        best_step: the step whose weights were kept.
        trainable_parameters: number of parameters that were trained.
        examples: number of training examples.
        tokens: tokens trained on.
        seconds: wall-clock time.
        settings: the settings of the recovery, by name.
    """

    curve: tuple[CurvePoint, ...]
    steps: int
    stopped_early: bool
    best_step: int
    trainable_parameters: int
    examples: int
    tokens: int
    seconds: float
    settings: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity on one corpus: column → perplexity.

    Attributes:
        protocol: how it was measured, in words.
    """

    columns: Mapping[str, float] = flat_field()
    protocol: str | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model's score in a task.

    Attributes:
        value: the score, in the unit of the task's metric.
        stderr: its standard error; null where the task has none.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """One of lm-eval's tasks, a group of tasks, or their average: column → `Score`.

    Attributes:
        metric: the name of the metric.
        samples: number of questions.
        fewshot: examples before each question; null where the tasks of an average differ.
        of: the group that the task is a member of.
    """

    metric: str
    samples: int
    fewshot: int | None
    of: str | None = None
    columns: Mapping[str, Score] = flat_field()


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """‖output − dense‖² / ‖dense‖² of one layer: column → relative squared error.

    Attributes:
        index: the layer in the dense model.
    """

    index: int
    columns: Mapping[str, float] = flat_field()


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """What the models made of one prompt: column → text.

    Attributes:
        prompt: the text that they began with.
        mode: how tokens were chosen, in words.
    """

    prompt: str
    mode: str
    columns: Mapping[str, str] = flat_field()


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Tokens per second: column → median over the turns.

    Attributes:
        prefill_tokens_per_second: of reading the prompt.
        decode_tokens_per_second: of writing, one token a sequence and pass.
        protocol: how it was measured, in words.
    """

    prefill_tokens_per_second: Mapping[str, float]
    decode_tokens_per_second: Mapping[str, float]
    protocol: str
