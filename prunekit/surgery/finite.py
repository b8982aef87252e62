"""Whether a model computes numbers at all, and which module is the first that does not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import DataError, TraceError, first_line
from prunekit.graph import CouplingGraph
from prunekit.surgery.check import expect
from prunekit.surgery.masking import run_example


def check_finite_outputs(model: nn.Module, graph: CouplingGraph) -> None:
    """Check that the model's outputs on the graph's example are finite numbers.

    Raises:
        DataError: they are not; the message names the first module that gives other numbers.
        TraceError: the model does not run on the example.
    """
    try:
        expect(model, graph, {})
    except DataError as error:
        names: list[str] = []
        handles = [
            module.register_forward_hook(partial(_note, names, path))
            for path, module in model.named_modules()
        ]
        try:
            run_example(model, graph)
        finally:
            for handle in handles:
                handle.remove()
        where = f": {names[0] or 'the model'} is the first to give one" if names else ""
        raise DataError(f"{error}{where}") from error
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__}: it does not run on two samples of the calibration data: "
            f"{first_line(error, named=True)}"
        ) from error


def _note(names: list[str], path: str, module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook that notes the path of a module whose output is not finite."""
    leaves = torch.utils._pytree.tree_leaves(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        names.append(path)
