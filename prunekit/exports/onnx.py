"""Write a model as an ONNX graph of its prefill: token ids and mask to logits, of any shape."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from prunekit.errors import ExportError, first_line, suggest
from prunekit.exports.base import Export, Written, require_package
from prunekit.model.compat import experts_computed
from prunekit.runtime.console import quiet
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
    logits [batch, sequence, vocabulary]. There is no cache in it: every run computes all positions.
    Positions count from the first column, padded or not. Needs the packages onnx and onnxscript.

    Attributes:
        opset: the version of ONNX's operators, 18 to 23.
        dtype: the type of the weights and the logits, float32 or float16.
        attention_mask: whether it is an input; without it nothing is padded.
        check: run the graph with onnxruntime, where that is installed, and compare it with the
            model.

    Raises:
        ExportError: an opset or a dtype that is none of these.
    """

    name: ClassVar[str] = "onnx"
    opset: int = 20
    dtype: str = "float32"
    attention_mask: bool = True
    check: bool = True

    def __post_init__(self) -> None:
        if type(self.opset) is not int or not _OLDEST <= self.opset <= _NEWEST:
            raise ExportError(f"export.opset: expected {_OLDEST} to {_NEWEST}, got {self.opset!r}")
        if self.dtype not in _TYPES:
            raise ExportError(
                f"export.dtype: {self.dtype!r} is unknown; {suggest(str(self.dtype), list(_TYPES))}"
            )

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
        """Write the folder; the tokenizer is not needed.

        Raises:
            ExportError: torch can't export the model, or onnxruntime computes something else.
        """
        prefill = _Prefill(model, _TYPES[self.dtype], self.attention_mask)
        path.mkdir()
        file = path / "model.onnx"
        num_bytes = sum(p.numel() * p.element_size() for p in prefill.parameters())
        with evaluating(prefill.model):
            program = _export_program(prefill, self.opset)
            program.save(file, external_data=num_bytes > LARGEST)
            difference = _measure_difference(file, prefill) if self.check else None
        if difference is None:
            checked = "not run"
        elif difference <= _TOLERANCE[self.dtype]:
            checked = f"onnxruntime's logits within {difference:.1e} of the largest"
        else:  # NaN too
            raise ExportError(
                f"export=onnx: onnxruntime's logits are off by {difference:.1e} of the largest"
            )
        return Written(file=file, about=f"opset {self.opset}, {self.dtype}, {checked}")


class _Prefill(nn.Module):
    """A language model without its cache: tensors in, one tensor out."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, masked: bool) -> None:
        super().__init__()
        accepted = inspect.signature(model.forward).parameters
        self.model = model
        if any(p.dtype != dtype for p in model.parameters()):
            self.model = copy.deepcopy(model)
            nn.Module.to(self.model, dtype)
        self.names = ["input_ids"]
        if masked and "attention_mask" in accepted:
            self.names.append("attention_mask")

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), use_cache=False).logits

    def example(self, rows: int, length: int) -> tuple[Tensor, ...]:
        """Inputs [rows, length], int64; with a mask, the first row is padded on the left."""
        ids = torch.arange(rows * length, device=self.model.device).view(rows, length)
        ids = ids % self.model.config.vocab_size
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        return (ids, mask)[: len(self.names)]


def _export_program(prefill: _Prefill, opset: int) -> ONNXProgram:
    """Let torch make a program of the model; ExportError with the first line of its error."""
    axes = tuple({0: "batch", 1: "sequence"} for _ in prefill.names)
    try:
        # ONNX has no grouped product, and no loop over the experts that are chosen.
        gathered = experts_computed(prefill.model, "batched_mm")
        with quiet("torch.onnx"), gathered, torch.no_grad():
            program = torch.onnx.export(
                prefill,
                prefill.example(2, 6),
                dynamo=True,
                dynamic_shapes=(axes,),
                opset_version=opset,
                input_names=prefill.names,
                output_names=["logits"],
                verbose=False,
            )
    except (
        Exception
    ) as error:  # torch.export, a decomposition and a translation have no common base
        cause = error.__cause__ or error
        raise ExportError(
            f"export=onnx: torch can't export {type(prefill.model).__name__}: "
            f"{first_line(cause, named=True)}"
        ) from error
    assert program is not None  # None is returned for dynamo=False only
    return program


@torch.no_grad()
def _measure_difference(file: Path, prefill: _Prefill) -> float | None:
    """How far onnxruntime's logits are off, over the largest logit; None without onnxruntime.

    The batch and the length are others than those that the graph was exported with.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    inputs = prefill.example(3, 9)
    expected = prefill(*inputs).float().cpu()
    arrays = [value.cpu().numpy() for value in inputs]
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        outputs = session.run(["logits"], dict(zip(prefill.names, arrays, strict=True)))
    except Exception as error:  # onnxruntime's own have no common base
        raise ExportError(
            f"export=onnx: onnxruntime can't run the graph: {first_line(error)}"
        ) from error
    logits = torch.from_numpy(outputs[0]).float()
    real = slice(inputs[0].shape[1] // 3, None)  # nobody reads the logits of padded positions
    return ((logits - expected)[:, real].abs().max() / expected.abs().max()).item()
