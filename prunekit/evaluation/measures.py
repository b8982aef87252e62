"""What every model of a run is measured with, dense, pruned or recovered: the same windows, tasks,
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.config import RunConfig
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import evaluation_windows
from prunekit.evaluation.cache import Cache, default_folder, model_key
from prunekit.evaluation.cost import macs, odd_widths, size, speed
from prunekit.evaluation.generation import check_prompt, continuation, prompts_of
from prunekit.evaluation.outputs import layer_outputs, relative_errors
from prunekit.evaluation.perplexity import perplexity, protocol
from prunekit.evaluation.tasks import check_tasks, evaluate_tasks
from prunekit.model.inputs import check_length, longest
from prunekit.runtime.files import digest
from prunekit.runtime.processes import rank

_TENSOR_CORES = (8, 64)  # matrix sides should be multiples of the one, and better of the other


class Measures:
    """What the `eval` section asks for, ready: texts are loaded and names checked before anything
    long begins.

    Args:
        config: the run's.
        tokenizer: the models'.
        device: where inputs go.
        model: any of the models; on meta, it is as good.
        stored: the type weights will have in the file.

    Raises:
        ConfigError: an unknown task, a window longer than the model allows.
        DataError: a corpus or a task's file that can't be read, is empty or too short.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Any,
        device: torch.device,
        model: nn.Module,
        stored: torch.dtype,
    ) -> None:
        self.given, self.seed, self.tokenizer, self.device, self.stored = (
            config.eval,
            config.seed,
            tokenizer,
            device,
            stored,
        )
        self.longest = longest(model)
        self.macs_tokens = min(self.given.macs, self.longest or self.given.macs)
        check_length("eval.window", self.given.window, model)
        self.windows: dict[str, Tensor] = {}
        for name in self.given.corpora:
            documents = load_corpus(name, "eval", config.corpora)
            cut = evaluation_windows(
                documents,
                tokenizer,
                self.given.window,
                self.given.max_tokens,
                name,
                self.given.stride,
            )
            stems = [Path(other).stem for other in self.given.corpora]
            self.windows[
                Path(name).stem if "/" in name and stems.count(Path(name).stem) == 1 else name
            ] = cut
        for prompt in prompts_of(self.given.prompts):
            check_prompt(prompt, tokenizer, self.longest)
        if self.given.tasks:
            check_tasks(self.given.tasks, self._tasks_dir, self.given.fewshot)
        folder = default_folder() if self.given.cache == "auto" else self.given.cache
        self._folder = Path(folder) if folder else None

    @property
    def _tasks_dir(self) -> Path | None:
        return Path(self.given.tasks_dir) if self.given.tasks_dir else None

    def perplexity(self, model: nn.Module, name: str) -> float:
        """On one corpus."""
        batch = None if self.given.batch_size == "auto" else self.given.batch_size
        return perplexity(model, self.windows[name], batch, name, self.device, self.given.stride)

    def of(self, model: Any, key: Callable[[], str | None] | None = None) -> dict[str, Any]:
        """Everything that is measured on one model; what an equal model gave before is taken from
        the cache.

        Args:
            model: ready to run.
            key: gives what tells its content from others', where its weights are not in memory;
                None: nothing can.

        Only the first of several processes measures.
        """
        if rank():
            return {"outputs": {}}
        wanted = self._folder and (self.windows or self.given.tasks)
        cache = Cache(self._folder, (key() if key else model_key(model)) if wanted else None)
        found: dict[str, Any] = {"perplexity": {}, **size(model, self.stored)}
        for name, windows in self.windows.items():
            text = f"{digest([windows.contiguous().numpy().data])} {tuple(windows.shape)}"
            how = f"perplexity {text} {self.given.stride} {self.given.batch_size}"
            found["perplexity"][name] = cache.remember(how, partial(self.perplexity, model, name))
        found["tasks"] = self.given.tasks and evaluate_tasks(
            model,
            self.tokenizer,
            self.given.tasks,
            tasks_dir=self._tasks_dir,
            limit=self.given.task_limit,
            fewshot=self.given.fewshot,
            batch_size=self.given.batch_size,
            seed=self.seed,
            cache=cache,
            device=self.device,
        )
        if self.given.macs:
            found["macs"] = macs(model, self.macs_tokens, self.device)
        sample: Callable[..., str] = partial(continuation, model, self.tokenizer)
        given = {
            "new_tokens": self.given.new_tokens,
            "device": self.device,
            "longest": self.longest,
            "seed": self.seed,
        }
        found["samples"] = [
            sample(prompt, **given, **how)
            for prompt in prompts_of(self.given.prompts)
            for how in self._modes().values()
        ]
        found["outputs"] = dict(enumerate(self._outputs(model)))
        found["odd"] = {side: odd_widths(model, side) for side in _TENSOR_CORES}
        return found

    def _modes(self) -> dict[str, dict[str, float]]:
        """How samples are taken: name → what `continuation` is told."""
        heat, share = self.given.temperature, self.given.top_p
        drawn = f"sampled, temperature {heat:g}, top-p {share:g}, seed {self.seed}"
        return {"greedy": {}, **({drawn: {"temperature": heat, "top_p": share}} if heat else {})}

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        windows = next(iter(self.windows.values()), None)
        if windows is None or not self.given.layer_tokens:
            return []
        rows = max(self.given.layer_tokens // self.given.window, 1)
        return layer_outputs(model, windows[:rows, : self.given.layer_tokens], self.device)

    def report(self, columns: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The report's part: what `of` found of each model, by the model's name; the dense one
        comes first.
        """
        names = list(columns)
        first, *others = names
        found: dict[str, Any] = {"models": names}
        for figure in ("parameters", "weight_bytes"):
            found[figure] = {name: columns[name][figure] for name in names}
        if self.given.macs:
            found["macs"] = {name: columns[name]["macs"]["total"] for name in names}
            found["macs_protocol"] = f"one forward pass of {self.macs_tokens} tokens"
            found["macs_by_module"] = {
                name: {
                    kind: count for kind, count in columns[name]["macs"].items() if kind != "total"
                }
                for name in names
            }
        found["perplexity"] = {
            corpus: {name: columns[name]["perplexity"][corpus] for name in names}
            | {"protocol": protocol(windows, self.given.stride)}
            for corpus, windows in self.windows.items()
        }
        if self.given.tasks:
            found["tasks"] = {
                task: {key: value for key, value in row.items() if key not in ("value", "stderr")}
                | {
                    name: {
                        key: columns[name]["tasks"][task].get(key) for key in ("value", "stderr")
                    }
                    for name in names
                }
                for task, row in columns[first]["tasks"].items()
            }
        if first == "dense" and others:
            outputs = {name: list(columns[name]["outputs"].values()) for name in names}
            errors = {name: relative_errors(outputs[first], outputs[name]) for name in others}
            rows = [
                dict(zip(errors, row, strict=True)) for row in zip(*errors.values(), strict=False)
            ]
            kept = columns[first]["outputs"]
            found["layer_error"] = [{"index": i, **row} for i, row in zip(kept, rows, strict=False)]
        found["warnings"] = self._odd(
            columns[first]["odd"], columns[others[0] if others else first]["odd"]
        )
        found["samples"] = [
            {
                "prompt": prompt,
                "mode": mode,
                **{name: columns[name]["samples"][i] for name in names},
            }
            for i, (prompt, mode) in enumerate(
                (p, m) for p in prompts_of(self.given.prompts) for m in self._modes()
            )
        ]
        return found

    @staticmethod
    def _odd(dense: dict[int, set[str]], pruned: dict[int, set[str]]) -> list[str]:
        """Warnings of matrices whose sides defeat the hardware, and did not in the dense model."""
        for side in _TENSOR_CORES:
            if odd := pruned[side] - (dense[side] if dense is not pruned else set()):
                slower = "much slower" if side == min(_TENSOR_CORES) else "slower"
                return [
                    f"{len(odd)} matrices have a side that is no multiple of {side} ({min(odd)}, …): GPUs run them "
                    f"{slower}; scope.width_multiple={side} keeps to such widths"
                ]
        return []

    def speed(self, models: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The report's part on tokens/s and peak memory."""
        given = self.given.latency
        new = min(given.new, (self.longest or 2 * given.new) // 2)
        prompt = min(given.prompt, (self.longest or given.prompt + new) - new)
        found = speed(models, given.batch, prompt, new, given.repeats)
        return {"evaluation_bytes": found.pop("peak_bytes"), "latency": found}
