"""A job: its inputs, the model that it works on, and its outcome."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prunekit.checkpoint import load_processor, load_tokenizer, save_pretrained
from prunekit.checkpoint.streamed import Streamed
from prunekit.config import RunConfig, build_as
from prunekit.errors import CheckpointError, ConfigError
from prunekit.evaluation.evaluation import Evaluation
from prunekit.evaluation.measures import Measures, Share, load_anew
from prunekit.jobs.export import ExportSettings
from prunekit.jobs.kept import Kept
from prunekit.jobs.sources import Source, content_of, inside_run, load_source, loading_of
from prunekit.jobs.updates import UPDATES, write_updates
from prunekit.model.parts import find_language_part
from prunekit.model.updates import Factors
from prunekit.plan import PruningPlan
from prunekit.recovery import Recovery, detach
from prunekit.report import Report, model_card
from prunekit.runtime.console import say
from prunekit.runtime.devices import pick_dtype
from prunekit.runtime.files import write_text
from prunekit.runtime.memory import free_bytes
from prunekit.runtime.stages import Stages
from prunekit.schedules.method import Backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHARE = 0.6  # of the free memory that a second model may take


@dataclass(frozen=True, kw_only=True)
class GivenObjects:
    """The objects that a caller in Python gives to a job; the command line gives none.

    Attributes:
        model: the model that the job works on; None: the one that `model.path` names.
        tokenizer: its tokenizer; None: the one in its folder.
        baseline: the dense model to measure beside; None: the one that `eval.baseline` names.
        backends: section → the backend in place of the one that the section names.
        recovery: in place of the one that the section `recovery` names.
        updates: what weights of the model hold, and adapters of the recovery go on from; None: what
            the run that left the model's folder has written beside it.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    baseline: PreTrainedModel | None = None
    backends: Mapping[str, Backend] = field(default_factory=dict)
    recovery: Recovery | None = None
    updates: Mapping[str, Factors] | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do, on which model, and where its result goes.

    Attributes:
        config: the configuration.
        source: the model that the job works on.
        output: the folder of the run.
        stages: the clock; it knows the device.
        export: what is written beside the model.
        inputs: the objects that the caller gave.
        kept: what the runs of a sweep have in common; None: this is no sweep.
    """

    config: RunConfig
    source: Source
    output: Path
    stages: Stages
    export: ExportSettings
    inputs: GivenObjects = GivenObjects()
    kept: Kept | None = None

    @property
    def baseline(self) -> Source | None:
        """The dense model that is measured beside, if there is one."""
        named = self.config.eval.baseline
        return self.inputs.baseline or (inside_run(named) if named else None)

    def kept_of(self, source: Source) -> Kept | None:
        """What is kept of a model for the next runs of a sweep: of the dense model alone."""
        dense = self.source if self.config.task == "prune" else self.baseline
        return self.kept if source == dense and isinstance(source, str | Path) else None

    def build_recovery(self) -> Recovery | None:
        """The recovery that is asked for, if any."""
        return self.inputs.recovery or build_as(Recovery, self.config.recovery, "recovery")

    def load(
        self, source: Source, stored: torch.dtype | None = None
    ) -> tuple[PreTrainedModel, torch.dtype]:
        """Load a model; the model and the type that its result is stored in (`load_source`)."""
        how = self.config.model
        stored, device = stored or pick_dtype(self.config.dtype), self.stages.device
        if isinstance(source, str | Path) and (kept := self.kept_of(source)) is not None:
            return kept.load(source, device, stored, how)
        return load_source(source, device, stored, how)

    def load_tokenizer(self, source: Source) -> PreTrainedTokenizerBase:
        """The tokenizer that was given, else the one beside the model."""
        if self.inputs.tokenizer is not None:
            return self.inputs.tokenizer
        if not isinstance(source, str | Path):
            raise ConfigError("tokenizer: expected the tokenizer of the model, got none")
        return load_tokenizer(source, self.config.model.trust_remote_code)

    def load_processor(self, source: Source, model: PreTrainedModel) -> Any:
        """The processor beside a model that also sees or hears; None where there is none."""
        if not isinstance(source, str | Path) or find_language_part(model) is None:
            return None
        try:
            return load_processor(source, self.config.model.trust_remote_code)
        except CheckpointError as error:
            say(f"warning: {error}; images can't be read, and the result has no processor")
            return None

    def open(
        self,
        source: Source,
        streamed: Streamed | None = None,
        measures: Measures | None = None,
    ) -> Subject:
        """Load a model and its measures; a streamed model is opened already.

        Two models of a job are measured alike: the second gets the `measures` of the first.
        """
        if streamed:
            model, stored = streamed.model, streamed.stored
        else:
            model, stored = self.load(source)
        self.export.check(model)
        kept = None if streamed else self.kept_of(source)
        if measures is None:
            tokenizer = self.load_tokenizer(source)
            share = load_anew if kept is None else kept.windows
            measures = self.make_measures(model, stored, tokenizer, share)
        return Subject(
            source=source,
            model=model,
            stored=stored,
            measures=measures,
            processor=self.load_processor(source, model),
            streamed=streamed,
            kept=kept,
        )

    def make_measures(
        self,
        model: PreTrainedModel,
        stored: torch.dtype,
        tokenizer: PreTrainedTokenizerBase,
        share: Share = load_anew,
    ) -> Measures:
        """What the `eval` section asks for, with texts by this tokenizer (`Measures`)."""
        return Measures(
            self.config.eval,
            corpora=self.config.corpora,
            seed=self.config.seed,
            tokenizer=tokenizer,
            device=self.stages.device,
            model=model,
            stored=stored,
            share=share,
        )

    def measure_speed(
        self,
        measures: Measures,
        columns: Mapping[str, Evaluation],
        beside: Mapping[str, Source],
        models: Mapping[str, PreTrainedModel],
    ) -> Report:
        """Measure the tokens/s of the models that are in memory, and of those `beside` them.

        The latter are loaded again where there is room, so that all models take turns.
        """
        if not (self.config.eval.speed and measures.windows):
            return Report()
        width = max(p.dtype.itemsize for model in models.values() for p in model.parameters())
        others = {}
        for name, source in beside.items():
            if columns[name].parameters * width <= _SHARE * free_bytes(self.stages.device):
                others[name] = self.load(source)[0]
        with self.stages("speed"):
            return Report.from_plain(measures.speed({**others, **models}).to_json())


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that a job works on.

    Attributes:
        source: where the model came from.
        model: the model; on the meta device where it is streamed.
        stored: the type that its result is stored in.
        measures: what it is measured by; it knows the tokenizer.
        processor: makes arguments of forward calls of images and text; None: there is none.
        streamed: the way to its layers on disk; None: they are in memory.
        kept: what the runs of a sweep have in common, if this is their dense model.
    """

    source: Source
    model: PreTrainedModel
    stored: torch.dtype
    measures: Measures
    processor: Any = None
    streamed: Streamed | None = None
    kept: Kept | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self.measures.tokenizer

    @property
    def preparation(self) -> Any:
        """What is saved beside the model: the processor with the tokenizer, or that alone."""
        if self.processor is None:
            return self.tokenizer
        self.processor.tokenizer = self.tokenizer
        return self.processor

    def evaluate_as_loaded(self) -> Evaluation:
        """Measure the model before anything is done to it; the runs of a sweep measure it once."""
        if self.streamed is not None:
            with self.streamed.evaluated():
                return self.measures.of(self.model, key=partial(content_of, self.source))
        if self.kept is None:
            return self.measures.of(self.model)
        digest = partial(self.kept.digest, self.model)
        return self.measures.of(self.model, key=digest, known=self.kept.figures)

    def evaluate(self) -> Evaluation:
        """Measure the model as it is now; figures of a streamed model are not cached."""
        if self.streamed is None:
            return self.measures.of(self.model)
        with self.streamed.evaluated():
            return self.measures.of(self.model, key=lambda: None)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The model that a job leaves, and what is saved with it.

    Attributes:
        model: the model; its layers are written already where it was streamed.
        tokenizer: its tokenizer, or the processor that holds it.
        plan: what was cut, where that is known.
        streamed: the writer of a streamed model.
        adapter: the folder of an adapter that was not merged into the weights.
        updates: what weights hold and a later recovery goes on with.
    """

    model: PreTrainedModel
    tokenizer: Any
    plan: PruningPlan | None
    streamed: Streamed | None = None
    adapter: Path | None = None
    updates: Mapping[str, Factors] = field(default_factory=dict)

    def write(self, output: Path, report: Report, remote_code: bool) -> None:
        """Write the model's folder with its card, the plan, the adapter, the updates."""
        if self.adapter is not None:
            detach(self.model)
        folder = output / "model"
        if self.streamed is not None and self.streamed.writer is not None:
            self.streamed.writer.finish(self.model, self.tokenizer, remote_code=remote_code)
        else:
            save_pretrained(self.model, folder, self.tokenizer, remote_code=remote_code)
        write_text(folder / "README.md", model_card(report, *loading_of(folder)))
        if self.plan is not None:
            write_text(output / "plan.json", self.plan.to_json())
        if self.adapter is not None:
            shutil.copytree(self.adapter, output / "adapter")
        if self.updates:
            write_updates(self.updates, output / UPDATES)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a job: figures for the report, and the new model if there is one."""

    figures: Report
    finished: Finished | None = None
