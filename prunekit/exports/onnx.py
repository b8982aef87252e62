"""Write a model as an ONNX graph of its prefill: token ids and their mask to logits, for any batch
and length.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import ExportError, suggest
from prunekit.model.compat import experts_computed
from prunekit.runtime.console import say
from prunekit.runtime.files import check_free, new_folder

LARGEST = (
    2**31 - 2**20
)  # bytes of weights in one file, protobuf's limit less the graph; more go beside it
_TYPES = {
    "float32": (torch.float32, 1e-3),
    "float16": (torch.float16, 3e-2),
}  # and how far logits may be off
_OLDEST, _NEWEST = 18, 23  # opsets that torch's exporter writes


@dataclass(frozen=True, kw_only=True)
class Onnx:
    """An ONNX graph: input_ids [batch, sequence] and attention_mask, as wide, to logits [batch,
    sequence, vocabulary].

    There is no cache in it: every run computes all positions. Positions count from the first
    column, padded or not.

    Attributes:
        opset: of ONNX, 18 to 23.
        dtype: of the weights and the logits, float32 or float16.
        attention_mask: whether it is an input; without it nothing is padded.
        check: run the graph with onnxruntime, where that is installed, and compare it with the
            model.

    Raises:
        ExportError: an opset or a dtype that is none of these.
    """

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

    def check_model(self, model: Any) -> None:
        """Raise ExportError where a package is missing; which models torch can export only shows
        when it does.
        """
        for name in ("onnx", "onnxscript"):
            _package(name)

    def write(self, model: Any, tokenizer: Any, target: Path) -> Path:
        """Write the folder `target/onnx`: model.onnx, and beyond 2 GiB its weights beside it; all
        of it or nothing.

        Args:
            model: a causal language model of transformers, dense or pruned.
            tokenizer: not needed.
            target: a folder; it is made where it is missing.

        Returns:
            The path of model.onnx.

        Raises:
            ExportError: a package is missing, torch can't export the model, or onnxruntime computes
                something else.
            CheckpointError: the folder exists, or can't be written.
        """
        self.check_model(model)
        folder = Path(target) / "onnx"
        check_free(folder)
        prefill = _Prefill(model, _TYPES[self.dtype][0], self.attention_mask)
        program = _exported(prefill, self.opset)
        with new_folder(folder) as temporary:
            beside = sum(p.numel() * p.element_size() for p in prefill.parameters()) > LARGEST
            program.save(temporary / "model.onnx", external_data=beside)
            found = _difference(temporary / "model.onnx", prefill) if self.check else None
            if found is not None and not found <= _TYPES[self.dtype][1]:
                raise ExportError(
                    f"export=onnx: onnxruntime's logits are off by {found:.1e} of the largest"
                )
        size = sum(file.stat().st_size for file in folder.iterdir())
        checked = (
            "not run"
            if found is None
            else f"onnxruntime's logits within {found:.1e} of the largest"
        )
        say(
            f"{folder / 'model.onnx'}: opset {self.opset}, {self.dtype}, {size / 1e6:.1f} MB, {checked}"
        )
        return folder / "model.onnx"


class _Prefill(nn.Module):
    """A language model without its cache: tensors in, one tensor out."""

    def __init__(self, model: Any, dtype: torch.dtype, masked: bool) -> None:
        super().__init__()
        accepted = inspect.signature(model.forward).parameters
        if "input_ids" not in accepted or not hasattr(model, "config"):
            raise ExportError(
                f"export=onnx: expected a causal language model, got {type(model).__name__}"
            )
        other = any(p.dtype != dtype for p in model.parameters())
        self.model = (copy.deepcopy(model).to(dtype) if other else model).eval()
        self.names = [
            "input_ids",
            *(["attention_mask"] if masked and "attention_mask" in accepted else []),
        ]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), use_cache=False).logits

    def example(self, rows: int, length: int) -> tuple[Tensor, ...]:
        """Inputs; the first row is padded on the left where there is a mask."""
        ids = (
            torch.arange(rows * length, device=self.model.device).view(rows, length)
            % self.model.config.vocab_size
        )
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        return (ids, mask)[: len(self.names)]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ExportError(
            f"export=onnx needs the package {name}: pip install prunekit[onnx]"
        ) from None


def _exported(prefill: _Prefill, opset: int) -> Any:
    """The program torch makes of it; ExportError with the first line of what torch says where there
    is none.
    """
    axes = tuple({0: "batch", 1: "sequence"} for _ in prefill.names)
    try:
        # ONNX has no product of groups, and no loop over the experts that are chosen.
        gathered = experts_computed(prefill.model, "batched_mm")
        with _quiet(), gathered, torch.no_grad():
            return torch.onnx.export(
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
    ) as error:  # of torch.export, of the decompositions, of an operator without a translation
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines() or [""]
        raise ExportError(
            f"export=onnx: torch can't export {type(prefill.model).__name__}: {type(cause).__name__}: {reason[0]}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings of what it may not need."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


@torch.no_grad()
def _difference(file: Path, prefill: _Prefill) -> float | None:
    """How far onnxruntime's logits are off on another batch and length, over the largest; None
    without onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    inputs = prefill.example(3, 9)
    expected = prefill(*inputs).float().cpu()
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        given = {
            name: value.cpu().numpy() for name, value in zip(prefill.names, inputs, strict=True)
        }
        found = torch.from_numpy(session.run(["logits"], given)[0]).float()
    except Exception as error:  # onnxruntime's own have no common base
        raise ExportError(
            f"export=onnx: onnxruntime can't run the graph: {str(error).splitlines()[0]}"
        ) from error
    real = slice(inputs[0].shape[1] // 3, None)  # what a padded position gives, nobody reads
    return ((found - expected)[:, real].abs().max() / expected.abs().max()).item()
