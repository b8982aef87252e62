"""Second moments of a consumer's inputs: H = X Xᵀ / tokens, the Hessian of its squared error.

They are running means, so that they are right after any number of batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekit.errors import DataError
from prunekit.runtime.numbers import is_half, widen
from prunekit.runtime.processes import add_up, world_size

# Columns of H that are updated at once. Of the symmetric H only the blocks on and below the
# diagonal are computed: half the work for large layers.
_PANEL = 1024


class Moments:
    """Means over tokens: of the inputs, their products, and the errors of the outputs.

    All are float32, or float64 for float64 inputs.

    Args:
        size: number of input features n.
        name: the name of the layer, for messages.
        device: the device of the inputs, and of the means.
        dtype: the dtype of the inputs.
        outputs: number of output features d; None where no errors will be given.

    Attributes:
        tokens: number of tokens taken in.
        hessian: E[x xᵀ] [n, n]; only its lower half is valid until `finish`.
        mean: E[x] [n].
        cross: E[e xᵀ] [d, n] for the errors e, or None.
        error: E[e] [d], or None.
    """

    def __init__(
        self,
        size: int,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        outputs: int | None = None,
    ) -> None:
        self.name = name
        self.tokens = 0
        self.dtype = widen(dtype)
        self.hessian = torch.zeros(size, size, device=device, dtype=self.dtype)
        self.mean = torch.zeros(size, device=device, dtype=self.dtype)
        self.cross = (
            None if outputs is None else torch.zeros(outputs, size, device=device, dtype=self.dtype)
        )
        self.error = (
            None if outputs is None else torch.zeros(outputs, device=device, dtype=self.dtype)
        )

    def add(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        error: Tensor | None = None,
        sample: int = 0,
    ) -> None:
        """Take in inputs [..., n], and errors [..., d] where there are `outputs`.

        `mask` [...] is False at padding. `sample` is the number of the first row, for messages.

        Raises:
            DataError: the inputs hold NaN or infinity.
        """
        if mask is not None and mask.shape != inputs.shape[:-1]:
            mask = None  # the positions were regrouped, as the tokens of an expert are
        x = (inputs.flatten(0, -2) if mask is None else inputs[mask]).detach()
        new = self.tokens + len(x)
        if not len(x):
            return
        old, share = self.tokens / new, 1 / new
        for start in range(0, len(self.hessian), _PANEL):
            panel = self.hessian[start:, start : start + _PANEL]
            _add_product(panel, x[:, start:], x[:, start : start + _PANEL], old, share)
        if not torch.isfinite(self.hessian.diagonal()).all():
            raise DataError(f"{self.name}: its inputs hold NaN or infinity{_where(inputs, sample)}")
        self.mean.mul_(old).add_(x.sum(0, dtype=self.dtype), alpha=share)
        if self.cross is not None and self.error is not None:
            assert error is not None
            e = error.flatten(0, -2) if mask is None else error[mask]
            _add_product(self.cross, e.detach(), x, old, share)
            self.error.mul_(old).add_(e.detach().sum(0, dtype=self.dtype), alpha=share)
        self.tokens = new

    def finish(self) -> Moments:
        """Merge the means of all processes, and fill the upper half of the Hessian."""
        if world_size() > 1:
            count = int(add_up(torch.tensor([self.tokens], device=self.hessian.device)))
            for mean in (self.hessian, self.mean, self.cross, self.error):
                if mean is not None:
                    add_up(mean.mul_(self.tokens / max(count, 1)))
            self.tokens = count
        self._mirror()
        if self.hessian.device.type == "mps":  # without float64, which the inversion may need
            self.hessian, self.mean = self.hessian.cpu(), self.mean.cpu()
            self.cross = None if self.cross is None else self.cross.cpu()
            self.error = None if self.error is None else self.error.cpu()
        return self

    def drop(self) -> None:
        """Let go of the Hessian, once its inverse is all that is needed."""
        self.hessian = self.hessian.new_empty(0, 0)

    @staticmethod
    def together(parts: Sequence[Moments]) -> Moments:
        """The moments of the tokens of all parts; the parts stay as they are."""
        first = parts[0]
        total = Moments(len(first.hessian), first.name, first.hessian.device, first.dtype)
        total.cross = None if first.cross is None else torch.zeros_like(first.cross)
        total.error = None if first.error is None else torch.zeros_like(first.error)
        total.tokens = sum(part.tokens for part in parts)
        for part in parts:
            share = part.tokens / max(total.tokens, 1)
            for name in ("hessian", "mean", "cross", "error"):
                if (sums := getattr(total, name)) is not None:
                    sums.add_(getattr(part, name), alpha=share)
        return total

    def _mirror(self) -> None:
        for start in range(0, len(self.hessian), _PANEL):
            end = start + _PANEL
            self.hessian[start:end, end:] = self.hessian[end:, start:end].T


def _add_product(total: Tensor, left: Tensor, right: Tensor, old: float, share: float) -> None:
    """Total ← old · total + share · leftᵀ right, in place.

    On a GPU half precision is multiplied as it is: the products are exact and summed in float32.
    """
    half = left.dtype == right.dtype and is_half(left.dtype)
    if half and left.is_cuda:
        total.mul_(old).add_(torch.mm(left.T, right, out_dtype=torch.float32), alpha=share)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype), beta=old, alpha=share)


def _where(inputs: Tensor, sample: int) -> str:
    """Which sample of inputs [B, ..., n] is not finite, in words; empty where no one can tell."""
    if inputs.ndim < 3:
        return ""
    bad = (~torch.isfinite(inputs.flatten(1))).any(1).nonzero().flatten()
    if not len(bad):
        return f" when squared (samples {sample} to {sample + len(inputs) - 1})"
    return f" in calibration sample {sample + int(bad[0])}"
