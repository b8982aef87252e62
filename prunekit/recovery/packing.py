"""Whether a model keeps the examples of a packed row apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from prunekit.errors import ConfigError
from prunekit.recovery.data import Row, collate
from prunekit.runtime.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# ‖together − alone‖ / ‖alone‖ of logits that rounding alone sets apart; half precision rounds more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_OF_HALF = 5e-2


@torch.no_grad()
def check_packing(model: PreTrainedModel, training: Sequence[Row], pad: int) -> None:
    """Raise ConfigError where the model lets an example see its neighbour in the row.

    The second example of a row must have the logits that it has alone.
    """
    rows = [row for row in training if len(row) > 1][:2]
    if not rows:
        return
    weight = next(model.parameters())
    tolerance = _TOLERANCE.get(weight.dtype, _TOLERANCE_OF_HALF)
    batch = {key: value.to(weight.device) for key, value in collate(rows, pad, True).items()}
    del batch["labels"]
    with evaluating(model):
        logits = model(**batch, use_cache=False).logits.float()
        for i, (first, second, *_) in enumerate(rows):
            begin = len(first.ids)
            together = logits[i, begin : begin + len(second.ids)]
            ids = second.ids.long()[None].to(weight.device)
            alone = model(input_ids=ids, use_cache=False).logits[0].float()
            if (together - alone).norm() > tolerance * alone.norm():
                raise ConfigError(
                    "recovery.pack: this model lets examples in a row see each other; "
                    "use recovery.pack=false"
                )
