"""Second moments of a consumer's inputs: H = X Xᵀ / tokens, the Hessian of its squared error.

They are running means, so that they are right after any number of batches. Where tokens have
weights (`prunekit.calibration.weighting`), H = Σ_t w_t x_t x_tᵀ / Σ_t w_t, and so are all means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.errors import DataError
from prunekit.runtime.numbers import computing_type, is_half
from prunekit.runtime.processes import add_up, world_size

# Columns of H that are updated at once. Of the symmetric H only the blocks on and below the
# diagonal are computed: half the work for large layers.
_PANEL = 1024
_ROOM = 4.0  # what errors are divided by to fit float16: the difference of two outputs may not


class Moments:
    """Means over tokens: of the inputs, their products, and the errors of the outputs.

    All are float32, or float64 for float64 inputs.

    Args:
        size: number of input features n.
        name: the name of the layer, for messages.
        device: the device of the inputs, and of the means.
        dtype: the dtype of the inputs.
        outputs: number of output features d; None where no errors will be given.
        weighted: whether tokens have weights; the means lack the division by `weight` until
            `finish`.

    Attributes:
        tokens: number of tokens taken in.
        weight: the mean weight of a token [], or None where all are alike.
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
        weighted: bool = False,
    ) -> None:
        self.name = name
        self.tokens = 0
        self._taken: list[_Taken] = []
        self.dtype = computing_type(dtype)
        self.weight = torch.zeros((), device=device, dtype=self.dtype) if weighted else None
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
        error: Tensor | None = None,
        samples: Sequence[int] = (),
        weights: Tensor | None = None,
    ) -> None:
        """Take in inputs [..., n], and errors [..., d] where there are `outputs`.

        `weights` [...] ≥ 0 are those of the tokens, where tokens have weights; without them a token
        weighs 1. `samples` are the numbers of the rows, for `check`. Nothing waits for the device.
        """
        x = inputs.detach().flatten(0, -2)
        root = peak = None
        if self.weight is not None:
            given = x.new_ones(inputs.shape[:-1]) if weights is None else weights
            root = given.to(x.device, self.dtype).flatten()[:, None].sqrt()
            peak = root.amax() if _multiplies_half(x) else None
            x = _weigh_rows(x, root, peak, x.dtype)
        new = self.tokens + len(x)
        if not len(x):
            return
        old, share = self.tokens / new, 1 / new
        for start in range(0, len(self.hessian), _PANEL):
            panel = self.hessian[start:, start : start + _PANEL]
            _add_product(panel, x[:, start:], x[:, start : start + _PANEL], old, share, peak)
        self._taken.append(_Taken.of(self.hessian, inputs, samples))
        self.mean.mul_(old).add_(_sum_rows(x, root, peak, self.dtype), alpha=share)
        if self.weight is not None and root is not None:
            self.weight.mul_(old).add_(root.square().sum(), alpha=share)
        if self.cross is not None and self.error is not None:
            assert error is not None
            e = error.detach().flatten(0, -2)
            e = e if root is None else _weigh_rows(e, root, peak, self.dtype)
            _add_product(self.cross, e, x, old, share, peak)
            self.error.mul_(old).add_(_sum_rows(e, root, peak, self.dtype), alpha=share)
        self.tokens = new

    def of_errors(self) -> tuple[Tensor, Tensor]:
        """E[e xᵀ] [d, n] and E[e] [d], which must be there."""
        assert self.cross is not None
        assert self.error is not None
        return self.cross, self.error

    def look(self) -> list[Tensor]:
        """Whether the means were finite after each of the inputs, as numbers on the device."""
        return [taken.sound for taken in self._taken]

    def check(self) -> None:
        """Wait for the device, and look at what was taken in since the last check.

        Raises:
            DataError: the inputs held NaN or infinity.
        """
        sound = torch.stack(self.look()).tolist() if self._taken else []
        if not all(sound):
            where = self._taken[sound.index(False)].where()
            raise DataError(f"{self.name}: its inputs hold NaN or infinity{where}")
        self._taken.clear()

    def finish(self) -> Moments:
        """Merge the means of all processes, and fill the upper half of the Hessian."""
        means = [self.hessian, self.mean, self.cross, self.error]
        if world_size() > 1:
            count = int(add_up(torch.tensor([self.tokens], device=self.hessian.device)))
            for mean in (*means, self.weight):
                if mean is not None:
                    add_up(mean.mul_(self.tokens / max(count, 1)))
            self.tokens = count
        if self.weight is not None:
            for mean in means:
                if mean is not None:
                    mean.div_(self.weight.clamp_min(_tiny(self.dtype)))
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
        """The moments of the tokens of all parts, which are finished; they stay as they are."""
        first = parts[0]
        total = Moments(len(first.hessian), first.name, first.hessian.device, first.dtype)
        total.cross = None if first.cross is None else torch.zeros_like(first.cross)
        total.error = None if first.error is None else torch.zeros_like(first.error)
        total.tokens = sum(part.tokens for part in parts)
        total.weight = None if first.weight is None else torch.zeros_like(first.weight)
        for part in parts:
            share = part.tokens / max(total.tokens, 1)
            if total.weight is not None and part.weight is not None:
                total.weight.add_(part.weight, alpha=share)
        for part in parts:
            share = part.tokens / max(total.tokens, 1)
            for name in ("hessian", "mean", "cross", "error"):
                if (sums := getattr(total, name)) is None:
                    continue
                if total.weight is None or part.weight is None:
                    sums.add_(getattr(part, name), alpha=share)
                else:
                    own = share * part.weight / total.weight.clamp_min(_tiny(first.dtype))
                    sums.addcmul_(getattr(part, name), own)
        return total

    def _mirror(self) -> None:
        for start in range(0, len(self.hessian), _PANEL):
            end = start + _PANEL
            self.hessian[start:end, end:] = self.hessian[end:, start:end].T


def _tiny(dtype: torch.dtype) -> float:
    """The smallest normal number of a type, which keeps 0 / 0 out."""
    return torch.finfo(dtype).tiny


def _multiplies_half(rows: Tensor) -> bool:
    """Whether rows are multiplied in half precision, which only a GPU sums up in float32."""
    return rows.is_cuda and is_half(rows.dtype)


def _weigh_rows(rows: Tensor, root: Tensor, peak: Tensor | None, dtype: torch.dtype) -> Tensor:
    """√w_t x_t of rows x_t [N, n], given √w_t [N, 1], in float32 at least.

    Where products are taken in half precision, √w_t is divided by its `peak` [], so that no row
    leaves the range of half precision, and the result has the given dtype.
    """
    wide = rows.to(root.dtype)
    return wide * root if peak is None else (wide * (root / _at_least(peak))).to(dtype)


def _at_least(peak: Tensor) -> Tensor:
    """The largest √w_t, or a tiny number where all are zero."""
    return peak.clamp_min(_tiny(peak.dtype))


def _sum_rows(rows: Tensor, root: Tensor | None, peak: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ_t x_t [n] of rows x_t [N, n]; of rows √w_t x_t (`_weigh_rows`) Σ_t w_t x_t."""
    if root is None:
        return rows.sum(0, dtype=dtype)
    total = (root.T @ rows.to(root.dtype))[0]
    return total if peak is None else total * _at_least(peak)


def _add_product(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    old: float,
    share: float,
    peak: Tensor | None = None,
) -> None:
    """Total ← old · total + share · leftᵀ right, in place; times peak² where rows lack √w_t.

    On a GPU half precision is multiplied as it is: the products are exact and summed in float32.
    Errors in float32 are rounded to it; they are differences of outputs that were rounded to it.
    """
    if not _multiplies_half(right):
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype), beta=old, alpha=share)
        return
    if left.dtype != right.dtype:
        room = _ROOM if right.dtype == torch.float16 else 1.0
        left, share = (left if room == 1 else left / room).to(right.dtype), share * room
    if peak is not None:
        product = torch.mm(left.T, right, out_dtype=total.dtype)
        total.mul_(old).addcmul_(product, _at_least(peak).square(), value=share)
        return
    torch.addmm(total, left.T, right, out_dtype=total.dtype, beta=old, alpha=share, out=total)


@dataclass(frozen=True)
class _Taken:
    """What `check` has to know of some inputs.

    `sound`: whether the means are finite with them. `finite` [rows]: whether the inputs are; None
    where their rows are no samples.
    """

    sound: Tensor
    finite: Tensor | None
    samples: Sequence[int]

    @classmethod
    def of(cls, hessian: Tensor, inputs: Tensor, samples: Sequence[int]) -> _Taken:
        """Look at inputs [B, ..., n] that `hessian` holds by now."""
        sound = torch.isfinite(hessian.diagonal()).all()
        if inputs.ndim < 3 or len(samples) != len(inputs):
            return cls(sound, None, samples)
        sums = inputs.detach().flatten(1).sum(1, dtype=hessian.dtype)
        return cls(sound, torch.isfinite(sums), samples)

    def where(self) -> str:
        """Which sample is not finite, in words; empty where no one can tell."""
        if self.finite is None:
            return ""
        finite = self.finite.tolist()
        if all(finite):
            return f" when squared (samples {self.samples[0]} to {self.samples[-1]})"
        return f" in calibration sample {self.samples[finite.index(False)]}"
