"""The loss that gates are trained with: next tokens, KL to the dense model, or both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import is_language_model, mean_loss, next_token_loss
from prunekit.data.batches import Batch, padding_mask
from prunekit.errors import DataError
from prunekit.model.inputs import without_cache
from prunekit.runtime.numbers import at_least_float32

_KEPT_BYTES = 1 << 30  # of the dense model's logits; beyond, they are computed each time


class Dense:
    """The logits of the dense model, kept where they take little memory.

    Args:
        model: the dense model, which no gates are on when it is asked.
        batches: what it is asked about, by number.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self._kept: dict[int, Tensor] = {}
        self._left = _KEPT_BYTES

    @torch.no_grad()
    def logits(self, number: int) -> Tensor:
        """The logits [B, T, V] of a batch.

        Raises:
            DataError: the model is no language model.
        """
        if number in self._kept:
            return self._kept[number]
        batch = self.batches[number]
        outputs = self.model(**without_cache(self.model, batch))
        if not is_language_model(self.model, outputs, batch):
            raise DataError(
                f"{type(self.model).__name__}: KL to the dense model takes a language model that "
                "is called with input_ids; importance.train.kl=0 importance.train.plain=1 trains "
                "with the loss of any model"
            )
        logits: Tensor = outputs.logits
        if logits.nbytes <= self._left:
            self._kept[number] = logits
            self._left -= logits.nbytes
        return logits


def divergence(logits: Tensor, dense: Tensor, batch: Batch) -> Tensor:
    """KL(dense ‖ model) of the next token, mean over positions that are no padding.

    Args:
        logits: of the model [B, T, V].
        dense: of the dense model [B, T, V].
        batch: tells the padding.
    """
    expected = at_least_float32(dense).log_softmax(-1)
    own = at_least_float32(logits).log_softmax(-1)
    values = (expected.exp() * (expected - own)).sum(-1)
    mask = padding_mask(batch)
    if mask is None:
        return values.mean()
    mask = mask.to(values.device)
    return (values * mask).sum() / mask.sum()


def gated_loss(
    model: nn.Module, batch: Batch, dense: Tensor | None, plain: float, kl: float
) -> tuple[Tensor, Tensor | None]:
    """The loss of a model that gates are on: plain · next-token loss + kl · KL(dense ‖ model).

    `dense` holds the dense model's logits; None where kl is 0. The next-token loss alone comes with
    it; None where it would be for nothing, in training without it.
    """
    if dense is None:
        own = mean_loss(model, batch).value
        return plain * own, own
    outputs = model(**without_cache(model, batch))
    loss = kl * divergence(outputs.logits, dense, batch)
    if not plain and torch.is_grad_enabled():
        return loss, None
    own = next_token_loss(outputs.logits, batch).value
    return (loss + plain * own if plain else loss), own
