"""What becomes of one model when it is pruned, saved and loaded: the trial of `families.py`."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny_models
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import prunekit
import prunekit.pipeline
from prunekit.errors import ConfigError, PrunekitError
from prunekit.graph.example import trace_batch
from prunekit.model.inputs import without_cache

METHODS = ("magnitude", "slimgpt", "llm_pruner")
RATIO = 0.2
WORK = ("choose_and_cut",)  # what runs in this function of prunekit comes after the preparation


class Wrong(Exception):
    """The pruned model computes something else than it should."""


def try_type(model_type: str) -> dict[str, Any]:
    """Build a type's tiny model and try all methods on it: a row of the table."""
    began = time.process_time()
    row: dict[str, Any] = {"type": model_type, "steps": {}}
    with _noting(row, "build"):
        model = tiny_models.build(model_type)
        row["parameters"] = sum(p.numel() for p in model.parameters())
    if row["steps"]["build"] == "holds":
        with _noting(row, "dense run"):
            answer(model, token_ids(2, 12))
        with tracing_once():
            try_model(model, row)
    else:
        with _noting(row, "folder"), tempfile.TemporaryDirectory() as folder:
            load_empty(tiny_models.make_config(model_type), Path(folder))
    row["verdict"], row["seconds"] = judge(row), round(time.process_time() - began, 1)
    return row


@contextlib.contextmanager
def tracing_once() -> Iterator[None]:
    """Let the three methods share one trace: the same model, with the same example."""
    graphs: list[Any] = []

    def trace_once(model: nn.Module, batch: Mapping[str, Any], *check: Any) -> Any:
        graphs.append(graphs[0] if graphs else trace_batch(model, batch, *check))
        return graphs[0]

    with patch.object(prunekit.pipeline, "trace_batch", trace_once):
        yield


def try_model(model: nn.Module, row: dict[str, Any]) -> None:
    """Prune copies of a model by every method; the last of them is generated with and saved."""
    with _noting(row, "trace"):
        example = without_cache(model, tiny_models.example(model, token_ids(8, 24, seed=1)))
        graph = prunekit.pipeline.trace_batch(model, example)
        row["groups"] = dict(Counter(group.kind for group in graph.groups))
        row["fixed"] = {
            f"{g.kind}: {g.reason}": g.name for g in graph.groups if not g.prunable and g.reason
        }
    if row["steps"]["trace"] != "holds":
        return
    pruned = masked = None
    for method in METHODS:
        with _noting(row, method):
            pruned, masked = prune(model, method, row)
    if pruned is None or masked is None:
        return
    with _noting(row, "generate"):
        compare_generation(pruned, masked)
    if row["steps"]["generate"] != "holds":
        with _noting(row, "dense generate"):
            compare_generation(model, model)
    for name, load in (
        ("load", load_by_prunekit),
        ("remote code", load_by_remote_code),
        ("registration", load_by_registration),
    ):
        with _noting(row, name):
            compare_loaded(pruned, load)
        if row["steps"][name] != "holds" and "dense load" not in row["steps"]:
            with _noting(row, "dense load"):
                compare_loaded(model, load_by_transformers)


def prune(model: nn.Module, method: str, row: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """A pruned copy of a model and the same model masked, compared on new inputs."""
    pruned = copy.deepcopy(model)
    calibration = tiny_models.calibration(model, token_ids(8, 24, seed=1))
    began = time.process_time()
    try:
        result = prunekit.prune(pruned, ratio=RATIO, method=method, calibration=calibration)
    except ConfigError as error:  # a tiny model has much that no default group holds
        if "out of reach" not in str(error):
            raise
        result = prunekit.prune(pruned, ratio=RATIO / 4, method=method, calibration=calibration)
    graph, removed = result.graph, result.plan.removed
    row.setdefault("cut", {})[method] = {
        "seconds": round(time.process_time() - began, 1),
        "ratio": round(result.report["ratio"]["achieved"], 3),
        "kinds": dict(Counter(graph[name].kind for name, units in removed.items() if units)),
        "inexact": sum(not graph[name].exact for name, units in removed.items() if units),
    }
    masked = mask(model, pruned, graph, removed)
    ids = token_ids(3, 17, seed=2)
    found, expected = answer(pruned, ids), answer(masked, ids)
    if not torch.isfinite(found).all():
        raise Wrong("the outputs are no numbers")
    if row["cut"][method]["inexact"] == 0:
        apart = (found - expected).abs().max().item()
        if not apart <= 1e-3 * expected.abs().max().item():
            raise Wrong(f"pruned and masked differ by {apart:.2g} of {expected.abs().max():.2g}")
        return pruned, masked
    return pruned, pruned  # no masked model equals it


def mask(
    model: nn.Module, pruned: nn.Module, graph: Any, removed: Mapping[str, list[int]]
) -> nn.Module:
    """The dense model with the weights that the pruned one has, and zeros where units are gone."""
    masked = copy.deepcopy(model)
    gone: dict[tuple[str, int], set[int]] = {}
    for name, units in removed.items():
        for member in graph[name].members:
            place = gone.setdefault((member.parameter, member.dim), set())
            place.update(member.index[units].flatten().tolist())
    kept, tensors = dict(pruned.named_parameters()), dict(masked.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in kept:
                _scatter(tensor, kept[name], {d: i for (n, d), i in gone.items() if n == name})
        _zero_consumers(tensors, graph, removed)
    _add_biases(masked, kept, tensors)
    return masked


def _scatter(tensor: Tensor, kept: Tensor, gone: Mapping[int, set[int]]) -> None:
    """Write a cut tensor back to the places that it had; the others keep what they hold."""
    index = [
        torch.tensor([i for i in range(size) if i not in gone.get(dim, ())], dtype=torch.long)
        for dim, size in enumerate(tensor.shape)
    ]
    if tuple(map(len, index)) == tuple(kept.shape) and tensor.ndim:
        tensor[torch.meshgrid(*index, indexing="ij")] = kept


def _zero_consumers(tensors: Mapping[str, Tensor], graph: Any, removed: Mapping) -> None:
    for name, units in removed.items():
        group = graph[name]
        for member in group.members:
            zeroed = member.role == "consumer" or not group.consumers
            if zeroed and member.parameter in tensors:
                index = member.index[units].flatten()
                tensors[member.parameter].index_fill_(member.dim, index, 0)


def _add_biases(masked: nn.Module, kept: Mapping[str, Tensor], there: Mapping) -> None:
    """Give the masked model biases that a repair or a whole sublayer's cut added."""
    for name in kept.keys() - there.keys():
        path, _, last = name.rpartition(".")
        masked.get_submodule(path).register_parameter(last, nn.Parameter(kept[name].clone()))


def compare_generation(pruned: Any, masked: Any) -> None:
    """Raise Wrong where a model with a cache writes another text than the masked one without."""
    ids = token_ids(1, 6, seed=3)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with quiet():
        found = pruned.generate(**tiny_models.prompt(pruned, ids), **settings)
        expected = masked.generate(**tiny_models.prompt(masked, ids), use_cache=False, **settings)
    for step, (one, other) in enumerate(zip(found.logits, expected.logits, strict=True)):
        apart = (one - other).abs().max().item()
        if not apart <= 1e-3 * other.abs().max().item():
            raise Wrong(f"step {step} of generation with a cache differs by {apart:.2g}")
        if not torch.equal(one.argmax(-1), other.argmax(-1)):
            return  # two tokens are as likely as each other: the texts part here


def compare_loaded(model: nn.Module, load: Callable[[Any, Path], Any]) -> None:
    """Raise Wrong where a model that is saved and loaded gives other outputs.

    Kernels add in another order where weights lie otherwise in memory, so that the last bit may
    differ: 1e-6 of the largest output is allowed.
    """
    ids = token_ids(3, 11, seed=4)
    with tempfile.TemporaryDirectory() as folder, quiet():
        loaded = load(model, Path(folder) / "model")
        found, expected = answer(loaded.eval(), ids), answer(model, ids)
    apart = (found - expected).abs().max().item()
    if not apart <= 1e-6 * expected.abs().max().item():
        raise Wrong(f"the loaded model's outputs differ by {apart:.2g}")


def load_by_prunekit(model: Any, folder: Path) -> Any:
    """What prunekit loads of a folder that it saved."""
    prunekit.save_pretrained(model, folder)
    return prunekit.from_pretrained(folder)


def load_by_remote_code(model: Any, folder: Path) -> Any:
    """What transformers loads with the code in the folder."""
    prunekit.save_pretrained(model, folder, remote_code=True)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def load_by_registration(model: Any, folder: Path) -> Any:
    """What transformers' auto class loads after prunekit registered itself."""
    prunekit.save_pretrained(model, folder)
    prunekit.register_with_transformers()
    return AutoModelForCausalLM.from_pretrained(folder)


def load_by_transformers(model: Any, folder: Path) -> Any:
    """What transformers loads of what it saved itself."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def load_empty(config: Any, folder: Path) -> Any:
    """What prunekit loads of a folder whose config no model can be built of."""
    (folder / "config.json").write_text(config.to_json_string())
    weights = {f"weight_{number}": torch.zeros(1) for number in range(64)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return prunekit.from_pretrained(folder)


def answer(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of a model on token ids."""
    with torch.no_grad():
        output = model(**without_cache(model, tiny_models.example(model, ids)))
    return output.logits if hasattr(output, "logits") else output[0]


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [rows, length] without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        tiny_models.SPECIAL, tiny_models.VOCABULARY, (rows, length), generator=generator
    )


@contextlib.contextmanager
def _noting(row: dict[str, Any], step: str) -> Iterator[None]:
    """Note how a step ends: it holds, is refused before any work, fails late, or is wrong."""
    began = time.process_time()
    try:
        yield
        row["steps"][step] = "holds"
    except Wrong as error:
        row["steps"][step] = f"wrong: {error}"
    except (Exception, SystemExit) as error:
        frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        early = isinstance(error, PrunekitError) and not frames & set(WORK)
        word = "refused" if early else "fails"
        name = "" if isinstance(error, PrunekitError) else f"{type(error).__name__}: "
        took = time.process_time() - began
        where = "" if early else f" [{_last_frame(error)}]"
        row["steps"][step] = f"{word} after {took:.1f} s: {name}{str(error)[:600]}{where}"


def _last_frame(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what is written to the terminal to itself."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def judge(row: Mapping[str, Any]) -> str:
    """The verdict on a type."""
    steps = dict(row["steps"])
    steps.pop("dense run", None)
    dense = {name: steps.pop(f"dense {name}", "holds") for name in ("generate", "load")}
    if steps["build"] != "holds":
        return "refused" if steps.get("folder", "").startswith("refused") else "not built"
    refused = [steps.get(name, "").startswith("refused") for name in ("trace", *METHODS)]
    if refused[0] or all(refused[1:]):
        return "refused"
    bad = {name: text for name, text in steps.items() if text != "holds"}
    ours = {
        name: text
        for name, text in bad.items()
        if dense["generate" if name == "generate" else "load"] == "holds" or name in METHODS
    }
    if any(text.startswith("wrong") for text in ours.values()):
        return "wrong"
    if ours:
        return "fails"
    return "holds but for what the dense model can't either" if bad else "holds"
