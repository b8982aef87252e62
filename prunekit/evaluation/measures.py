"""Measure the models of a run alike: on the same windows, with the same tasks and prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.config import EvalConfig
from prunekit.data.corpora import load_corpus, stamp_of
from prunekit.data.tokens import DENSEST, evaluation_windows
from prunekit.errors import ConfigError
from prunekit.evaluation.cache import Cache, default_folder, model_key
from prunekit.evaluation.comparison import TENSOR_CORES, Comparison
from prunekit.evaluation.cost import Macs, count_macs, measure_size, odd_widths
from prunekit.evaluation.evaluation import Evaluation
from prunekit.evaluation.generation import (
    Continuation,
    Drawing,
    check_prompt,
    continue_prompt,
    expand_prompts,
)
from prunekit.evaluation.outputs import layer_outputs
from prunekit.evaluation.perplexity import describe_protocol, perplexity
from prunekit.evaluation.speed import Speed, measure_speed
from prunekit.evaluation.task_scores import TaskScore
from prunekit.evaluation.tasks import check_tasks, evaluate_tasks
from prunekit.model.inputs import check_length, longest, predicts_tokens
from prunekit.runtime.files import digest
from prunekit.runtime.processes import rank, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Share = Callable[[Hashable, Callable[[], Tensor]], Tensor]  # (how, load) → what `load` returns


def load_anew(how: Hashable, load: Callable[[], Tensor]) -> Tensor:
    """What `load` returns: nothing is shared with other measures."""
    return load()


class Measures:
    """What the `eval` section asks for, ready to be measured on any number of models.

    Texts are loaded and names are checked here, before anything long begins.

    Args:
        settings: the `eval` section of the configuration.
        corpora: the `corpora` section: name → where the texts of the corpus are.
        seed: of few-shot examples and of drawn samples.
        tokenizer: the tokenizer of all the models.
        device: where inputs go.
        model: any of the models; one on the meta device will do.
        stored: the type that weights have in the model's file.
        share: returns token windows that other measures with this tokenizer have loaded already.

    Attributes:
        windows: corpus → token windows, int64 [N, T].

    Raises:
        ConfigError: an unknown task, a window longer than the model allows, a prompt that does not
            fit, a model that does not predict the next token.
        DataError: a corpus or a task's file that can't be read, is empty or too short.
    """

    def __init__(
        self,
        settings: EvalConfig,
        *,
        corpora: Mapping[str, Mapping[str, Any]],
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        model: nn.Module,
        stored: torch.dtype,
        share: Share = load_anew,
    ) -> None:
        self.settings, self.seed, self.tokenizer = settings, seed, tokenizer
        self.device, self.stored = device, stored
        if (settings.corpora or settings.tasks or settings.prompts) and not predicts_tokens(model):
            raise ConfigError(
                "eval: expected a model that predicts the next token of a text, got "
                f"{type(model).__name__}; eval=none takes any"
            )
        self.longest = longest(model)
        self.macs_tokens = min(settings.macs, self.longest or settings.macs)
        if settings.corpora:
            check_length("eval.window", settings.window, model)
        self.windows = {
            shown: share(self._how_windows(name, corpora), partial(self._windows, name, corpora))
            for name, shown in _name_corpora(settings.corpora).items()
        }
        self.prompts = expand_prompts(settings.prompts)
        for prompt in self.prompts:
            check_prompt(prompt, tokenizer, self.longest)
        self._tasks_dir = Path(settings.tasks_dir) if settings.tasks_dir else None
        if settings.tasks:
            check_tasks(settings.tasks, self._tasks_dir, settings.fewshot)
        folder = default_folder() if settings.cache == "auto" else settings.cache
        self._cache_folder = Path(folder) if folder else None

    def _how_windows(self, name: str, corpora: Mapping[str, Mapping[str, Any]]) -> Hashable:
        """What decides the windows of a corpus, beside the tokenizer."""
        settings = self.settings
        sizes = settings.window, settings.max_tokens, settings.stride
        return "eval", stamp_of(name, corpora), *sizes

    def _windows(self, name: str, corpora: Mapping[str, Mapping[str, Any]]) -> Tensor:
        limit = self.settings.max_tokens
        characters = limit and limit * DENSEST
        return evaluation_windows(
            load_corpus(name, "eval", corpora, self.tokenizer, characters),
            self.tokenizer,
            self.settings.window,
            limit,
            name,
            self.settings.stride,
        )

    def perplexity(self, model: nn.Module, corpus: str, shared: bool = False) -> float:
        """The perplexity of a model on one corpus; `shared` as in the function of this name."""
        size, stride = self.settings.batch_size, self.settings.stride
        batch = None if size == "auto" else size
        windows = self.windows[corpus]
        return perplexity(model, windows, batch, corpus, self.device, stride, shared)

    def of(
        self,
        model: PreTrainedModel,
        key: Callable[[], str | None] | None = None,
        known: MutableMapping[str, Any] | None = None,
    ) -> Evaluation:
        """Everything that is measured on one model.

        Figures of an equal model come from the cache. Several processes share perplexities and
        tasks, where each holds the model; all else the first one measures, and the others return
        without it.

        Args:
            model: ready to run.
            key: returns a digest of the model's content, where its weights are not in memory; where
                it returns None, nothing is cached.
            known: what this process has measured on equal models, which is not measured again, and
                is added to; nothing of it is used where `eval.cache` turns the cache off.
        """
        size = measure_size(model, self.stored)
        shared = world_size() > 1 and not any(weight.is_meta for weight in model.parameters())
        first = Evaluation(parameters=size.parameters, weight_bytes=size.weight_bytes)
        if rank() and not shared:
            return first
        cache = self._open_cache(model, key, known, shared)
        first = replace(
            first, perplexity=self._perplexities(model, cache), tasks=self._tasks(model, cache)
        )
        if rank():
            return first
        return replace(
            first,
            macs=cache.hold("macs", self.macs_tokens, partial(self._macs, model)),
            samples=cache.hold("samples", self._how_samples(), partial(self._samples, model)),
            outputs=cache.hold("outputs", self._how_outputs(), partial(self._outputs, model)),
            odd_widths={side: odd_widths(model, side) for side in TENSOR_CORES},
        )

    def _open_cache(
        self,
        model: PreTrainedModel,
        key: Callable[[], str | None] | None,
        known: MutableMapping[str, Any] | None,
        shared: bool,
    ) -> Cache:
        """The cache of a model; the first process alone looks into it and fills it."""
        if rank():
            return Cache(shared=shared)
        uses_cache = self._cache_folder and (
            self.windows or self.settings.tasks or known is not None
        )
        content = (key() if key else model_key(model)) if uses_cache else None
        return Cache(self._cache_folder, content, known, shared)

    def _perplexities(self, model: nn.Module, cache: Cache) -> dict[str, float]:
        values: dict[str, float] = {}
        for corpus, windows in self.windows.items():
            text = _content_of(windows)
            how = f"perplexity {text} {self.settings.stride} {self.settings.batch_size}"
            measure = partial(self.perplexity, model, corpus, cache.shared)
            values[corpus] = cache.remember(how, measure)
        return values

    def _tasks(self, model: PreTrainedModel, cache: Cache) -> dict[str, TaskScore]:
        if not self.settings.tasks:
            return {}
        return evaluate_tasks(
            model,
            self.tokenizer,
            self.settings.tasks,
            tasks_dir=self._tasks_dir,
            limit=self.settings.task_limit,
            fewshot=self.settings.fewshot,
            batch_size=self.settings.batch_size,
            seed=self.seed,
            cache=cache,
            device=self.device,
        )

    def _macs(self, model: nn.Module) -> Macs | None:
        return count_macs(model, self.macs_tokens, self.device) if self.settings.macs else None

    def _how_samples(self) -> tuple[object, ...]:
        """What decides the samples, beside the model and its tokenizer."""
        drawn = self.settings.temperature, self.settings.top_p, self.seed
        return self.prompts, self.settings.new_tokens, self.longest, drawn

    def _samples(self, model: PreTrainedModel) -> tuple[Continuation, ...]:
        """Each prompt greedily continued, then, where a temperature is set, by drawn tokens."""
        drawings = [Drawing(seed=self.seed)]
        if heat := self.settings.temperature:
            drawings.append(Drawing(temperature=heat, top_p=self.settings.top_p, seed=self.seed))
        samples: list[Continuation] = []
        for prompt in self.prompts:
            for drawing in drawings:
                text = continue_prompt(
                    model,
                    self.tokenizer,
                    prompt,
                    self.settings.new_tokens,
                    drawing=drawing,
                    device=self.device,
                    longest=self.longest,
                )
                samples.append(Continuation(prompt=prompt, mode=str(drawing), text=text))
        return tuple(samples)

    def _output_windows(self) -> Tensor | None:
        """The first windows of the first corpus; None where layers' outputs are not asked for."""
        windows, tokens = next(iter(self.windows.values()), None), self.settings.layer_tokens
        if windows is None or not tokens:
            return None
        return windows[: max(tokens // self.settings.window, 1), :tokens]

    def _how_outputs(self) -> str | None:
        """What decides the layers' outputs, beside the model."""
        windows = self._output_windows()
        return None if windows is None else _content_of(windows)

    def _outputs(self, model: nn.Module) -> dict[int, Tensor]:
        """Each layer's outputs on the first windows of the first corpus."""
        windows = self._output_windows()
        if windows is None:
            return {}
        return dict(enumerate(layer_outputs(model, windows, self.device)))

    def compare(self, columns: Mapping[str, Evaluation]) -> Comparison:
        """The models' evaluations side by side.

        Args:
            columns: the model's name → what `of` measured; the dense model comes first.
        """
        protocols = {
            corpus: describe_protocol(windows, self.settings.stride)
            for corpus, windows in self.windows.items()
        }
        return Comparison(columns=columns, macs_tokens=self.macs_tokens, protocols=protocols)

    def speed(self, models: Mapping[str, PreTrainedModel]) -> Speed:
        """Tokens a second and peak memory of the models, within the length they were made for."""
        asked = self.settings.latency
        new = min(asked.new, (self.longest or 2 * asked.new) // 2)
        prompt = min(asked.prompt, (self.longest or asked.prompt + new) - new)
        return measure_speed(
            models, batch=asked.batch, prompt=prompt, new=new, repeats=asked.repeats
        )


def _content_of(windows: Tensor) -> str:
    """What tells token windows from others: a digest, and their sizes."""
    return f"{digest([windows.contiguous().numpy().data])} {tuple(windows.shape)}"


def _name_corpora(given: Sequence[str]) -> dict[str, str]:
    """Corpus as given → its name in the report; for a path the stem, unless two paths share it."""
    stems = [Path(name).stem for name in given]
    return {
        name: stem if "/" in name and stems.count(stem) == 1 else name
        for name, stem in zip(given, stems, strict=True)
    }
