"""A recovery as a part of a job: what it is trained on and after, where it is kept, how it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.config import flat
from prunekit.errors import CheckpointError, ConfigError
from prunekit.evaluation.measures import Measures
from prunekit.graph import CouplingGraph, trace
from prunekit.jobs.job import Job, Subject
from prunekit.jobs.sources import Source, identity_of
from prunekit.model.updates import Factors
from prunekit.model.weights import round_weights
from prunekit.recovery import Recovery, RecoveryResult, prepare, recover
from prunekit.recovery.data import Data
from prunekit.runtime.files import write_text
from prunekit.runtime.processes import rank, together, world_size

TRAINING = ".training"  # what an unfinished recovery leaves in its output folder


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """A recovery that is ready to run.

    Attributes:
        job: the job that it is a part of.
        recovery: the settings.
        subject: the pruned model.
        data: the rows that it is trained on.
        dense: the dense model, for a recovery that needs it as a teacher.
    """

    job: Job
    recovery: Recovery
    subject: Subject
    data: Data
    dense: Source | None

    @classmethod
    def prepare(
        cls, job: Job, recovery: Recovery, subject: Subject, dense: Source | None
    ) -> FineTuning:
        """Load the data; mistakes are found here, before anything long begins.

        Raises:
            ConfigError: a setting that doesn't fit the model, or a teacher that is missing.
            DataError: data that can't be read.
        """
        if recovery.needs_teacher and dense is None:
            raise ConfigError(
                "recovery=distill: expected the dense model, its teacher, as eval.baseline, got "
                "none"
            )
        data = prepare(
            subject.model,
            subject.tokenizer,
            recovery,
            known=job.config.corpora,
            seed=job.config.seed,
            watch=subject.measures.windows,
        )
        return cls(job=job, recovery=recovery, subject=subject, data=data, dense=dense)

    def run(
        self,
        facts: Mapping[str, Any],
        graph: CouplingGraph | None = None,
        updates: Mapping[str, Factors] | None = None,
    ) -> tuple[RecoveryResult, Path | None]:
        """Fine-tune the model in place.

        Args:
            facts: what the start depends on: a state with other facts is not gone on from.
            graph: the groups of the model before it was cut; traced where it is needed.
            updates: what adapters go on from (`prunekit.recovery.recover`).

        Returns:
            How it went, and the folder of the adapter where that was not merged.
        """
        job, subject, recovery = self.job, self.subject, self.recovery
        folder, measures = job.output / TRAINING, subject.measures
        _claim(folder, self._complete(facts), job.config.resume)
        with job.stages("recover"):
            result = recover(
                subject.model,
                subject.tokenizer,
                recovery,
                known=job.config.corpora,
                seed=job.config.seed,
                folder=folder,
                teacher=self._load_teacher(),
                watch={name: partial(_measure, measures, name) for name in measures.windows},
                modules=self._find_modules(graph),
                resume=job.config.resume,
                base=str(job.output / "model"),
                data=self.data,
                updates=updates,
            )
        if recovery.merge:
            round_weights(subject.model, subject.stored)
        return result, None if recovery.merge else folder / "adapter"

    def _complete(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The facts, with the data, the settings and the teacher."""
        own = {"recovery": asdict(self.recovery), "seed": self.job.config.seed}
        complete = {**facts, "data": self.data.fingerprint, **flat(own)}
        if self.recovery.needs_teacher and self.dense is not None:
            complete["teacher"] = identity_of(self.dense)
        return complete

    def _load_teacher(self) -> PreTrainedModel | None:
        if not self.recovery.needs_teacher or self.dense is None:
            return None
        return self.job.load(self.dense, self.subject.stored)[0]

    def _find_modules(self, graph: CouplingGraph | None) -> dict[str, set[str]] | None:
        """The modules of each kind, where only some kinds are trained."""
        if "all" in self.recovery.kinds:
            return None
        if graph is None:
            ids = torch.ones(2, 8, dtype=torch.long)
            graph = trace(self.subject.model, {"input_ids": ids, "use_cache": False})
        return modules_by_kind(self.subject.model, graph)


def modules_by_kind(model: nn.Module, graph: CouplingGraph) -> dict[str, set[str]]:
    """Kind of group → the modules that hold the units of such groups.

    What lies beside a module of attention belongs to attention too: a lone KV head is no group.
    """
    modules: dict[str, set[str]] = {"attention": set(), "mlp": set()}
    for group in graph.groups:
        holders = {member.parameter.rpartition(".")[0] for member in group.members}
        modules.setdefault(group.kind, set()).update(holders)
    parents = {name.rpartition(".")[0] for name in modules["attention"]}
    beside = {name for name, _ in model.named_modules() if name.rpartition(".")[0] in parents}
    modules["attention"] |= beside - modules["mlp"]
    return modules


def _measure(measures: Measures, corpus: str, model: nn.Module) -> float:
    """The perplexity, which all processes measure together: they must stop at the same step."""
    return measures.perplexity(model, corpus, shared=world_size() > 1)


def _claim(folder: Path, facts: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a recovery, or take the one that is there, of a run that was broken off.

    Raises:
        CheckpointError: an unfinished recovery, and `resume` is not asked for or facts differ.
    """
    path, facts = folder / "facts.json", json.loads(json.dumps(facts))
    with together():
        if rank():
            return
        if path.exists() and any(folder.glob("checkpoints/*")):
            if not resume:
                raise CheckpointError(
                    f"{folder}: holds an unfinished recovery: resume=true goes on with it"
                )
            _compare(folder, json.loads(path.read_text(encoding="utf-8")), facts)
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(facts))


def _compare(folder: Path, before: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    for key in sorted({*before, *facts}):
        if before.get(key) != facts.get(key):
            raise CheckpointError(
                f"resume: {folder} was made with {key}={before.get(key)}, this run has "
                f"{facts.get(key)}; remove it"
            )
