r"""Losses of a recovery, summed over the predicted tokens t; two of the three follow a teacher.



$$L = \frac1N \sum_t \left[ a\,(-\log p_t) + b\,T^2\,\mathrm{KL}(q^T_t \,\|\, p^T_t)
      + \frac cL \sum_{l=1}^{L} \frac{\|h^l_t - g^l_t\|^2}{\|g^l_t\|^2} \right]$$

with the model's p and hidden states h, the teacher's q and g, the temperature T; N counts the
tokens of the global batch, so nothing depends on how it is divided.

Shapes: N sequences, T tokens, V words of the vocabulary, D hidden width, M predicted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.recovery.examples import IGNORED
from prunekit.recovery.settings import Recovery
from prunekit.runtime.numbers import at_least_float32

_SMALLEST_ENERGY = 1e-12  # of a hidden state that is divided by


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p of the labels [M] under logits [M, V], summed, in float32."""
    return F.cross_entropy(at_least_float32(logits), labels, reduction="sum")


def kl_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ model) of logits [M, V] at temperature T, summed over M, in float32."""
    ours, theirs = (
        F.log_softmax(at_least_float32(x) / temperature, dim=-1) for x in (logits, teacher)
    )
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


def hidden_loss(states: Sequence[Tensor], teacher: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """The squared error of hidden states relative to the teacher's energy.

    It is the mean over layers, and summed over tokens. Where the teacher has more layers, each of
    the model's is compared with the one at the same relative depth.

    Args:
        states: the model's hidden states [N, T, D], the embeddings first.
        teacher: the teacher's hidden states, likewise.
        chosen: bool [N, T]: the tokens that count.

    Raises:
        ConfigError: their widths differ.
    """
    if states[0].shape[-1] != teacher[0].shape[-1]:
        raise ConfigError(
            f"recovery.hidden: expected hidden states as wide as the teacher's "
            f"{teacher[0].shape[-1]}, got {states[0].shape[-1]}; use recovery.hidden=0"
        )
    ours, theirs = len(states) - 1, len(teacher) - 1
    total = torch.zeros((), device=states[0].device)
    for layer in range(1, ours + 1):
        student = at_least_float32(states[layer][chosen])
        goal = at_least_float32(teacher[round(layer * theirs / ours)][chosen])
        energy = goal.square().sum(-1).clamp_min(_SMALLEST_ENERGY)
        total = total + ((student - goal).square().sum(-1) / energy).sum()
    return total / max(ours, 1)


def forward(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Any:
    """The model's output on a batch without its labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs, use_cache=False, **options)


def mark_predicted(batch: Mapping[str, Tensor]) -> Tensor:
    """Bool [N, T − 1]: the positions whose next token is predicted."""
    return batch["labels"][:, 1:] != IGNORED


def total_loss(
    model: nn.Module, teacher: nn.Module | None, batch: Mapping[str, Tensor], recovery: Recovery
) -> Tensor:
    """The weighted sum of the losses, not yet divided by the number of tokens.

    Raises:
        ConfigError: the teacher has another vocabulary, or other widths.
    """
    options = {"output_hidden_states": True} if recovery.hidden else {}
    chosen = mark_predicted(batch)
    output = forward(model, batch, **options)
    logits = output.logits[:, :-1][chosen]
    total = recovery.plain * plain_loss(logits, batch["labels"][:, 1:][chosen])
    if teacher is None:
        return total
    with torch.no_grad():
        target = forward(teacher, batch, **options)
    if recovery.kl:
        goal = target.logits[:, :-1][chosen]
        check_vocabulary(logits, goal)
        total = total + recovery.kl * kl_loss(logits, goal, recovery.temperature)
    if recovery.hidden:
        ours, theirs = ([h[:, :-1] for h in out.hidden_states] for out in (output, target))
        total = total + recovery.hidden * hidden_loss(ours, theirs, chosen)
    return total


def check_vocabulary(logits: Tensor, teacher: Tensor) -> None:
    """Raise ConfigError where logits [M, V] of model and teacher are for other vocabularies."""
    if teacher.shape != logits.shape:
        raise ConfigError(
            f"recovery.kl: expected a teacher with the model's vocabulary of {logits.shape[-1]}, "
            f"got {teacher.shape[-1]}"
        )
