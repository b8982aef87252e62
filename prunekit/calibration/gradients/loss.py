"""The loss whose gradient is wanted: the mean next-token loss, or whatever scalar a model returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.data.batches import Batch, padding_mask
from prunekit.errors import DataError
from prunekit.model.inputs import without_cache
from prunekit.runtime.numbers import at_least_float32

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A scalar to differentiate, and how many next tokens (padding excluded) or samples stand
    behind its parts.

    `counts` has one number a sample where `value` is the sum of the samples' own means, otherwise a
    single one.
    """

    value: Tensor
    counts: tuple[int, ...]


def mean_loss(model: nn.Module, batch: Batch, *, by_sample: bool = False) -> Loss:
    """The mean loss of a batch; `by_sample`: the sum over samples of each one's own mean.

    A language model's loss is taken from its logits [B, T, V]; any other model must return one
    (`.loss` or ["loss"]), which is taken as it is.

    Raises:
        DataError: the model has no loss.
    """
    outputs = model(**without_cache(model, batch))
    if is_language_model(outputs, batch):
        return _next_token_loss(outputs.logits, batch, by_sample)
    value: Any = (
        outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
    )
    if not isinstance(value, Tensor) or value.ndim:
        raise DataError(
            f"{type(model).__name__}: the calibration loss takes a model that returns a scalar `loss`"
        )
    return Loss(value=value, counts=(num_samples(batch),))


def calibration_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss over the calibration set, under the grad mode of the caller."""
    losses = [mean_loss(model, batch) for batch in batches]
    counts = [sum(loss.counts) for loss in losses]
    values = torch.stack([loss.value.detach() for loss in losses]).tolist()
    total = sum(value * count for value, count in zip(values, counts, strict=True))
    return total / max(sum(counts), 1)


def is_language_model(outputs: Any, batch: Batch) -> bool:
    """Whether these outputs hold logits [B, T, V] of the batch's `input_ids` [B, T]."""
    logits = getattr(outputs, "logits", None)
    return isinstance(logits, Tensor) and logits.ndim == 3 and batch.get("input_ids") is not None


def num_samples(batch: Batch) -> int:
    """The size of dim 0: of `input_ids` where there are some, otherwise of the first tensor."""
    tensors = [batch.get("input_ids"), *batch.values()]
    return next((len(v) for v in tensors if isinstance(v, Tensor) and v.ndim), 1)


def split(batch: Batch) -> Sequence[Batch]:
    """The batch's samples, each as a batch of one: every tensor with a sample a row is cut along
    dim 0.
    """
    size = num_samples(batch)

    def cut(value: Any, j: int) -> Any:
        return (
            value[j : j + 1]
            if isinstance(value, Tensor) and value.ndim and len(value) == size
            else value
        )

    return [{key: cut(value, j) for key, value in batch.items()} for j in range(size)]


def _next_token_loss(logits: Tensor, batch: Batch, by_sample: bool) -> Loss:
    """From logits [B, T, V]; padding is no target and predicts none.

    The last position has no target, so that no logits are copied to leave it out.
    """
    ids, mask = batch["input_ids"], padding_mask(batch)
    targets = ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)
    targets = F.pad(targets, (0, 1), value=IGNORED).to(logits.device)
    predicted = at_least_float32(logits.flatten(0, 1))
    losses = F.cross_entropy(predicted, targets.flatten(), reduction="none", ignore_index=IGNORED)
    sums, counts = losses.view(targets.shape).sum(1), (targets != IGNORED).sum(1)
    if by_sample:
        return Loss(value=(sums / counts.clamp_min(1)).sum(), counts=tuple(counts.tolist()))
    return Loss(value=sums.sum() / counts.sum().clamp_min(1), counts=(int(counts.sum()),))
