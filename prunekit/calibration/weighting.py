"""Token weights: how much each token counts in the second moments H = Σ_t w_t x_t x_tᵀ / Σ_t w_t.

In trained models a few tokens (the first, delimiters) have activations hundreds of times as large
as all others' (massive activations, Sun et al. 2024, arXiv 2402.17762). Unweighted, they own the
moments, although the norm before the next block divides each token by its own size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from prunekit.errors import ConfigError, DataError, expect_one_of
from prunekit.runtime.processes import gather_all, world_size

Tokens = Literal["equal", "relative", "clipped", "without_first", "gradient"]
# How errors in the outputs of a consumer are weighed where units are chosen: all alike, or by the
# Fisher information of the outputs, E[δ²] of each output or E[δ δᵀ], with δ = ∂L/∂y.
Outputs = Literal["equal", "diagonal", "full"]


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How tokens are weighed.

    Args:
        tokens: equal: all alike. relative: w = 1 / ‖h‖², h the dense residual stream behind the
            block: the error that the next norm will see. clipped: w = min(1, c² / ‖h‖²), c a
            quantile of ‖h‖ over all tokens. without_first: 0 for the first tokens of each sample, 1
            for the others. gradient: w = ‖∂L/∂y‖², y the consumer's output and L the summed loss:
            the Fisher-weighted error.
        clip_quantile: the quantile of clipped, in (0, 1).
        first_tokens: how many tokens without_first leaves out, at least one.
    """

    tokens: Tokens = "equal"
    clip_quantile: float = 0.99
    first_tokens: int = 1

    def check(self, section: str) -> None:
        """Refuse values out of range.

        Raises:
            ConfigError: an unknown weighting, a quantile outside (0, 1), no first token.
        """
        expect_one_of(f"{section}.tokens", self.tokens, get_args(Tokens))
        quantile, first = self.clip_quantile, self.first_tokens
        if isinstance(quantile, bool | str) or not 0 < quantile < 1:
            raise ConfigError(
                f"{section}.clip_quantile: expected a number in (0, 1), got {quantile!r}"
            )
        if isinstance(first, bool) or not isinstance(first, int) or first < 1:
            raise ConfigError(f"{section}.first_tokens: expected a whole number ≥ 1, got {first!r}")

    def settled(self) -> Weighting:
        """The same weighting with its unused options at their defaults, to compare with others."""
        used = {"clipped": "clip_quantile", "without_first": "first_tokens"}.get(self.tokens)
        return replace(EQUAL, tokens=self.tokens, **({used: getattr(self, used)} if used else {}))

    @property
    def needs_norms(self) -> bool:
        """Whether the weights come from norms in the dense model."""
        return self.tokens in ("relative", "clipped")

    def of_norms(self, squares: Sequence[Tensor]) -> list[Tensor]:
        """The weights [B, T] of each batch, given ‖h‖² [B, T] of each batch.

        All processes take the quantile over the tokens of all of them. A token of norm zero has
        nothing to reproduce: its relative weight is zero.
        """
        assert self.needs_norms
        if self.tokens == "relative":
            return [torch.where(square > 0, 1 / square, 0) for square in squares]
        limit = _quantile(_join(squares), self.clip_quantile)
        return [torch.where(square > limit, limit / square, 1) for square in squares]

    def of_positions(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
        """The weights [B, T] of each batch of these shapes under without_first.

        Raises:
            DataError: no sample is longer than what is left out.
        """
        longest = max(length for _, length in shapes)
        if longest <= self.first_tokens:
            raise DataError(
                f"tokens=without_first: expected samples of more than {self.first_tokens} tokens, "
                f"the longest has {longest}"
            )
        weights = []
        for rows, length in shapes:
            counts = torch.arange(length, device=device) >= self.first_tokens
            weights.append(counts.float().expand(rows, length))
        return weights


EQUAL = Weighting()


def _join(squares: Sequence[Tensor]) -> Tensor:
    """The values of all batches [tokens], and of all processes."""
    own = torch.cat([square.flatten() for square in squares])
    if world_size() == 1:
        return own
    return torch.cat(gather_all(own.cpu())).to(own.device)


def _quantile(values: Tensor, quantile: float) -> Tensor:
    """The smallest value that at least this share of the values [n] does not exceed."""
    place = max(math.ceil(quantile * len(values)), 1)
    return values.sort().values[place - 1]
