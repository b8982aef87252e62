"""The calibration loss: the mean next-token loss, or the scalar that another model returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.data.batches import Batch, count_positions, padding_mask
from prunekit.errors import DataError
from prunekit.model.inputs import predicts_tokens, without_cache
from prunekit.runtime.numbers import at_least_float32

IGNORED = -100  # the target of positions that don't count, as in transformers


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A scalar to differentiate, and the number of targets behind it.

    Targets are next tokens without padding, or samples where the model is no language model.
    `counts` has a number for each sample where `value` is the sum of the samples' own means, and a
    single one where it is the mean over all targets.
    """

    value: Tensor
    counts: tuple[int, ...]


def mean_loss(model: nn.Module, batch: Batch, *, by_sample: bool = False) -> Loss:
    """The mean loss of a batch; with `by_sample`, the sum of the mean losses of its samples.

    The loss of a language model is computed from its logits [B, T, V]. Any other model must return
    one (`.loss` or ["loss"]), which is taken as it is.

    Raises:
        DataError: the model has no loss.
    """
    outputs = model(**without_cache(model, batch))
    if is_language_model(model, outputs, batch):
        return next_token_loss(outputs.logits, batch, by_sample)
    value: Any = (
        outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
    )
    if not isinstance(value, Tensor) or value.ndim:
        raise DataError(
            f"{type(model).__name__}: the calibration loss takes a model that returns a scalar "
            "`loss`: a model of transformers does where the batches hold `labels`"
        )
    return Loss(value=value, counts=(count_positions(batch)[0],))


def calibration_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss over the calibration set, under the grad mode of the caller."""
    losses = [mean_loss(model, batch) for batch in batches]
    counts = [sum(loss.counts) for loss in losses]
    values = torch.stack([loss.value.detach() for loss in losses]).tolist()
    total = sum(value * count for value, count in zip(values, counts, strict=True))
    return total / max(sum(counts), 1)


def is_language_model(model: Any, outputs: Any, batch: Batch) -> bool:
    """Whether these outputs hold logits [B, T, V] of the tokens after the batch's `input_ids`."""
    if not predicts_tokens(model):
        return False
    logits, ids = getattr(outputs, "logits", None), batch.get("input_ids")
    if not isinstance(logits, Tensor) or not isinstance(ids, Tensor):
        return False
    return logits.ndim == 3 and logits.shape[:2] == ids.shape


def next_token_loss(logits: Tensor, batch: Batch, by_sample: bool = False) -> Loss:
    """The loss of predicting each token from those before it, given logits [B, T, V].

    Padding is no target and predicts none. The last position gets a target that doesn't count:
    leaving it out would copy all logits.
    """
    ids, mask = batch["input_ids"], padding_mask(batch)
    targets = ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)
    targets = F.pad(targets, (0, 1), value=IGNORED).to(logits.device)
    # Without gradients, row by row: float32 takes memory for one row of logits at a time.
    rows = 1 if not torch.is_grad_enabled() else len(logits)
    sums = torch.cat(
        [_sum_losses(*part) for part in zip(logits.split(rows), targets.split(rows), strict=True)]
    )
    counts = (targets != IGNORED).sum(1)
    if by_sample:
        return Loss(value=(sums / counts.clamp_min(1)).sum(), counts=tuple(counts.tolist()))
    return Loss(value=sums.sum() / counts.sum().clamp_min(1), counts=(int(counts.sum()),))


def _sum_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of each row's losses [B], given logits [B, T, V] and targets [B, T]."""
    predicted = at_least_float32(logits.flatten(0, 1))
    losses = F.cross_entropy(predicted, targets.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(targets.shape).sum(1)
