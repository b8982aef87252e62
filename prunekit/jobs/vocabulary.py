"""`groups=vocabulary`: tokens that texts don't need go from the tokenizer and from the model.

They go by the texts and not by the ratio, which is a share of what they leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit import config as cfg
from prunekit.config import RunConfig
from prunekit.data.corpora import open_corpus
from prunekit.data.vocabulary import ReducedVocabulary, count_tokens, reduce_vocabulary
from prunekit.errors import ConfigError, DataError
from prunekit.evaluation.evaluation import Evaluation
from prunekit.evaluation.measures import Measures
from prunekit.jobs.job import Job, Subject
from prunekit.report.parts import Vocabulary
from prunekit.surgery.vocabulary import cut_vocabulary, special_ids, vocabulary_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class PrunedVocabulary:
    """What `prune_vocabulary` leaves.

    Attributes:
        model: the model, which was changed in place.
        tokenizer: its tokenizer from now on, a copy with fewer tokens.
        kept: int64 [K], rising: the old id of each new id.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kept: Tensor


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    min_count: int = 1,
    multiple: int = 64,
) -> PrunedVocabulary:
    """Remove the tokens that texts don't need, from the model in place and from the tokenizer.

    Special tokens, bytes and whatever leads to a token that stays stay as well. A text whose tokens
    all stay is encoded as before, and its logits are the old ones of the tokens that stay; other
    texts are encoded by smaller tokens.

    Example:
        ```python
        smaller = prunekit.prune_vocabulary(model, tokenizer, texts)
        prunekit.save_pretrained(smaller.model, "smaller", smaller.tokenizer)
        ```

    Args:
        model: a model of transformers that reads tokens. Outputs of one without a head over them, a
            classifier's say, stay as they are.
        tokenizer: its fast tokenizer: byte-pair encoding or a unigram model.
        texts: the documents that tell which tokens are needed.
        min_count: how often a token must occur in them to stay.
        multiple: unused tokens fill the number of tokens up to a multiple of it: GPUs are slow at
            others.

    Raises:
        DataError: no text, or something else than a list of texts; a tokenizer that can't be
            rewritten.
        SurgeryError: the model depends on token ids beside its embedding and its head; it is then
            as it was.
    """
    if isinstance(texts, str | bytes):
        raise DataError(f"texts: expected a list of texts, got {type(texts).__name__}")
    texts = list(texts)
    if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
        raise DataError(f"texts: expected texts of type str, got {wrong[0]}")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError("texts: expected documents that tell which tokens are needed, got none")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise DataError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    counts = count_tokens(texts, tokenizer, vocabulary_rows(model))
    reduced = _reduce(model, tokenizer, counts, min_count, multiple)
    cut_vocabulary(model, reduced.kept)
    return PrunedVocabulary(model=model, tokenizer=reduced.tokenizer, kept=reduced.kept)


def _reduce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: Tensor,
    min_count: int,
    multiple: int,
) -> ReducedVocabulary:
    used = (counts >= min_count).nonzero().flatten().tolist()
    return reduce_vocabulary(tokenizer, used, special_ids(model), multiple)


def other_groups(config: RunConfig) -> list[str]:
    """The choices of `groups` beside `vocabulary`."""
    return [kind for kind in cfg.kinds_of(config.groups) if kind != cfg.VOCABULARY]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reduction:
    """The tokens of a job's model that go; nothing is cut before `cut` is called.

    Attributes:
        dense: the model of the job, with the tokenizer that it came with.
        subject: the same model, with the smaller tokenizer and what is measured by it.
        kept: int64 [K], rising: the old id of each new id.
        figures: what is told of it in the report.
    """

    dense: Subject
    subject: Subject
    kept: Tensor
    figures: Vocabulary

    @classmethod
    def plan(cls, job: Job, subject: Subject) -> Reduction:
        """Read the texts, and make the smaller tokenizer.

        Raises:
            DataError: a corpus that can't be read, or a tokenizer that can't be rewritten.
            SurgeryError: the model has no embedding of tokens.
        """
        config, rows = job.config, vocabulary_rows(subject.model)
        asked, text = config.vocabulary, config.data.calibration
        names = asked.corpora or list(text.samples_by_corpus())
        counts = torch.zeros(rows, dtype=torch.long)
        for name in names:
            documents = open_corpus(name, "calibration", config.corpora, subject.tokenizer)
            counts += count_tokens(documents, subject.tokenizer, rows)
        reduced = _reduce(subject.model, subject.tokenizer, counts, asked.min_count, asked.multiple)
        measures = job.make_measures(subject.model, subject.stored, reduced.tokenizer)
        figures = Vocabulary(
            corpora=tuple(Path(name).name for name in names),
            text_tokens=int(counts.sum()),
            distinct_tokens=int((counts > 0).sum()),
            tokens={"dense": rows, "pruned": len(reduced.kept)},
        )
        smaller = replace(subject, measures=measures, kept=None)
        return cls(dense=subject, subject=smaller, kept=reduced.kept, figures=figures)

    def cut(self) -> None:
        """Cut the model, in place."""
        cut_vocabulary(self.subject.model, self.kept)

    def comparable(self, dense: Evaluation) -> Evaluation:
        """The dense model's figures, without its layers' outputs where it reads other tokens."""
        before, after = _first_windows(self.dense.measures), _first_windows(self.subject.measures)
        same = before is None or after is None or self._equal(before, after)
        return dense if same else replace(dense, outputs={})

    def warnings(self) -> tuple[str, ...]:
        """What tells the perplexities of the two tokenizers apart, in whole sentences."""
        told = []
        after: Mapping[str, Tensor] = self.subject.measures.windows
        for corpus, before in self.dense.measures.windows.items():
            if not self._equal(before, after[corpus]):
                told.append(
                    f"{corpus}: the smaller tokenizer splits some of its words into more tokens: "
                    "perplexities per token don't compare with the dense model's; more text in "
                    "vocabulary.corpora keeps more words whole"
                )
        return tuple(told)

    def _equal(self, before: Tensor, after: Tensor) -> bool:
        """Whether windows of new ids stand for the same tokens as those of old ids."""
        return torch.equal(before, self.kept[after])


def _first_windows(measures: Measures) -> Tensor | None:
    return next(iter(measures.windows.values()), None)


def refuse_teacher(recovery: Any) -> None:
    """Raise ConfigError for a recovery by the dense model, whose tokens are others."""
    if recovery is not None and recovery.needs_teacher:
        raise ConfigError(
            "recovery=distill: the dense model, its teacher, has the tokens that groups=vocabulary "
            "removes; expected recovery=lora, or groups without vocabulary"
        )
