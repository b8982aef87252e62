"""Write a model as an ONNX graph: token ids and mask to logits, with or without a cache."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from prunekit.errors import ExportError, first_line, suggest
from prunekit.exports.base import Export, Written, require_package
from prunekit.exports.onnx_graphs import Cached, Graph, Prefill
from prunekit.model.compat import experts_computed
from prunekit.runtime.console import quiet
from prunekit.runtime.files import write_text
from prunekit.runtime.modes import evaluating

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Bytes of weights in one file: protobuf's limit less the graph. More go into a file beside it.
LARGEST = 2**31 - 2**20
_TYPES = {"float32": torch.float32, "float16": torch.float16}
_TOLERANCE = {"float32": 1e-3, "float16": 3e-2}  # of the logits, relative to the largest
_OLDEST, _NEWEST = 18, 23  # opsets that torch's exporter writes


@dataclass(frozen=True, kw_only=True)
class Onnx(Export):
    """An ONNX graph; `write` leaves the folder `onnx` with model.onnx, and beyond 2 GiB with a file
    of its weights.

    It takes input_ids [batch, sequence] and attention_mask of the same shape, both int64, and gives
    logits [batch, sequence, vocabulary]. Every run computes all positions, which count from the
    first column, padded or not. Needs the packages onnx and onnxscript.

    With a cache (`onnx_graphs.Cached`) it also takes and gives the keys and values of each layer,
    and the mask is of all tokens so far. Beside it lie `genai_config.json`, by which
    onnxruntime-genai runs it, and the tokenizer.

    Attributes:
        opset: the version of ONNX's operators, 18 to 23.
        dtype: the type of the weights, the logits and the cache, float32 or float16.
        attention_mask: whether it is an input; without it nothing is padded.
        cache: whether keys and values are inputs and outputs.
        check: run the graph with onnxruntime, where that is installed, and compare it with the
            model.

    Raises:
        ExportError: an opset or a dtype that is none of these; a cache without a mask.
    """

    name: ClassVar[str] = "onnx"
    opset: int = 20
    dtype: str = "float32"
    attention_mask: bool = True
    cache: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        if type(self.opset) is not int or not _OLDEST <= self.opset <= _NEWEST:
            raise ExportError(f"export.opset: expected {_OLDEST} to {_NEWEST}, got {self.opset!r}")
        if self.dtype not in _TYPES:
            raise ExportError(
                f"export.dtype: {self.dtype!r} is unknown; {suggest(str(self.dtype), list(_TYPES))}"
            )
        if self.cache and not self.attention_mask:
            raise ExportError("export.cache=true: expected export.attention_mask=true, got false")

    @property
    def target(self) -> str:
        """The name of the folder."""
        return "onnx"

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise ExportError where a package is missing or the model takes no token ids.

        Whether torch can export a model shows only when it tries to.
        """
        for package in ("onnx", "onnxscript"):
            require_package(package, self.name)
        accepted = inspect.signature(model.forward).parameters
        if "input_ids" not in accepted or not hasattr(model, "config"):
            raise ExportError(
                f"export=onnx: expected a causal language model, got {type(model).__name__}"
            )

    def create(
        self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Written:
        """Write the folder; without a cache the tokenizer is not needed.

        Raises:
            ExportError: torch can't export the model, or onnxruntime computes something else.
        """
        path.mkdir()
        file = path / "model.onnx"
        dtype = _TYPES[self.dtype]
        with evaluating(model):
            graph = Cached(model, dtype) if self.cache else Prefill(model, dtype)
            if not self.attention_mask:
                graph.names = [name for name in graph.names if name != "attention_mask"]
            num_bytes = sum(p.numel() * p.element_size() for p in graph.parameters())
            program = _export_program(graph, self.opset)
            program.save(file, external_data=num_bytes > LARGEST)
            difference = _measure_difference(file, graph) if self.check else None
        if difference is None:
            checked = "not run"
        elif difference <= _TOLERANCE[self.dtype]:
            checked = f"onnxruntime's logits within {difference:.1e} of the largest"
        else:  # NaN too
            raise ExportError(
                f"export=onnx: onnxruntime's logits are off by {difference:.1e} of the largest"
            )
        if isinstance(graph, Cached):
            write_text(path / "genai_config.json", json.dumps(graph.describe(), indent=2) + "\n")
            if tokenizer is not None:
                tokenizer.save_pretrained(path)
        return Written(file=file, about=f"opset {self.opset}, {self.dtype}, {checked}")


def _export_program(graph: Graph, opset: int) -> ONNXProgram:
    """Let torch make a program of the model; ExportError with the first line of its error."""
    try:
        # ONNX has no grouped product, and no loop over the experts that are chosen.
        gathered = experts_computed(graph.model, "batched_mm")
        with quiet("torch.onnx"), gathered, torch.no_grad():
            program = torch.onnx.export(
                graph,
                graph.example(2, 6, 3),
                dynamo=True,
                dynamic_shapes=(graph.axes,),
                opset_version=opset,
                input_names=graph.inputs,
                output_names=graph.outputs,
                verbose=False,
            )
    except (
        Exception
    ) as error:  # torch.export, a decomposition and a translation have no common base
        cause = error.__cause__ or error
        raise ExportError(
            f"export=onnx: torch can't export {type(graph.model).__name__}: "
            f"{first_line(cause, named=True)}"
        ) from error
    assert program is not None  # None is returned for dynamo=False only
    return program


@torch.no_grad()
def _measure_difference(file: Path, graph: Graph) -> float | None:
    """How far onnxruntime's logits are off, over the largest logit; None without onnxruntime.

    The batch and the length are others than those that the graph was exported with. A graph with a
    cache is run twice, on all tokens but the last one, and on that one.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    values = dict(zip(graph.inputs, graph.example(3, 9, 0), strict=True))
    expected = graph.compute(values).float().cpu()
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        logits = graph.run(session, values).float()
    except Exception as error:  # onnxruntime's own have no common base
        raise ExportError(
            f"export=onnx: onnxruntime can't run the graph: {first_line(error)}"
        ) from error
    real = slice(values["input_ids"].shape[1] // 3, None)  # nobody reads logits of padded positions
    return ((logits - expected)[:, real].abs().max() / expected.abs().max()).item()
