"""Padding: batches of samples of unequal length are split into rows that have none.

Whatever looks at single tokens then needs no mask, which would have to be that of its tokens: an
encoder, a decoder, an image tower and experts have tokens of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunekit.data.batches import Batch, copy_batch
from prunekit.errors import DataError
from prunekit.model.inputs import rows_of_packed
from prunekit.runtime.modes import at_rest

# Masks [samples, tokens] → whose tokens they are of, and what they hold at tokens. The first one of
# a side counts.
_MASKS = {
    "attention_mask": ("text", True),
    "decoder_attention_mask": ("decoder", True),
    "encoder_attention_mask": ("encoder", True),
    "src_key_padding_mask": ("encoder", False),  # these as in torch's own transformers
    "memory_key_padding_mask": ("encoder", False),
    "tgt_key_padding_mask": ("decoder", False),
}
# How the names of other arguments begin → whose they are; those of all others are of the text.
_SIDES = {
    **{"decoder": "decoder", "tgt": "decoder", "pixel": "images"},
    **{"encoder": "encoder", "src": "encoder", "memory": "encoder"},
}
_POSITIONS = ("position_ids", "cache_position")  # [tokens], or more dims in front of these
_KNOWN = {
    *("input_ids", "inputs_embeds", "token_type_ids", "labels", "src", "tgt", "memory"),
    *_POSITIONS,
}
_WAY_OUT = "give samples of unequal length as batches of one sample each, without padding"


def remove_padding(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """Split padded batches into rows without their padding, in the same order.

    Rows that follow one another and have the same padding stay together; batches without padding
    stay as they are. Rows of nothing but padding are left out.

    Args:
        model: the model that the batches are for; its config tells whose tokens `labels` are.
        batches: keyword arguments of forward calls. Padding is where `attention_mask` [B, T],
            `decoder_attention_mask` and their like are zero, and torch's `src_key_padding_mask`
            and its like are true. A mask of more dims says who attends to whom.

    Raises:
        DataError: padding between tokens; arguments that can't be split into rows; a module of
            one's own, of whose arguments it isn't clear which one a mask belongs to, or to which a
            mask means the opposite; nothing but padding.
    """
    rows: list[Batch] = []
    checked = not _is_own(model)
    for batch in batches:
        masks = _find_masks(model, batch)
        if masks and not checked:
            _check_meaning(model, batch, masks)
            checked = True
        rows += _split(model, batch, masks) if masks else [batch]
    if batches and not rows:
        raise DataError("calibration: expected tokens, got nothing but padding")
    return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class _Mask:
    """A mask of a batch: `kept` [B, T] is False at padding, `whose` are the arguments it is of."""

    name: str
    kept: Tensor
    whose: Sequence[str]


def _find_masks(model: nn.Module, batch: Batch) -> dict[str, _Mask]:
    """Side → its mask, of the sides that have padding."""
    masks: dict[str, _Mask] = {}
    for name, (side, kept) in _MASKS.items():
        given = batch.get(name)
        if side in masks or not isinstance(given, Tensor) or given.ndim != 2:
            continue
        mask = given.bool() == kept
        whose = [] if mask.all() else _find_masked(model, batch, name, side)
        if whose:  # some models ignore theirs (Whisper)
            masks[side] = _Mask(name=name, kept=mask, whose=whose)
    return masks


def _find_masked(model: nn.Module, batch: Batch, name: str, side: str) -> list[str]:
    """The arguments [B, T, …] that a mask [B, T] is of.

    Raises:
        DataError: this isn't clear of a module of one's own.
    """
    shape = batch[name].shape
    whose = [
        other
        for other, value in batch.items()
        if isinstance(value, Tensor) and value.shape[:2] == shape and other not in _MASKS
        if _side_of(model, other) == side
    ]
    if _is_own(model):
        several = len(whose) > 1 and not _KNOWN.issuperset(whose)
        if several or not whose or shape[0] == shape[1]:
            raise DataError(
                f"calibration: {name} {list(shape)}: whose padding it tells of isn't clear among "
                f"{', '.join(batch)}: {_WAY_OUT}"
            )
    return whose


def _is_own(model: nn.Module) -> bool:
    """Whether a module is none of transformers: what its arguments mean isn't known."""
    return not hasattr(getattr(model, "config", None), "is_encoder_decoder")


@torch.no_grad()
def _check_meaning(model: nn.Module, batch: Batch, masks: Mapping[str, _Mask]) -> None:
    """Check that outputs at tokens depend on tokens, and not on padding.

    Raises:
        DataError: they do not: a mask may mean the opposite to a module of one's own.
    """

    def run(mask: _Mask, changed: Tensor) -> list[Tensor]:
        given = dict(copy_batch(batch))
        for name in mask.whose:
            value = given[name]
            turned = value.max() + value.min() - value  # token ids stay in their range
            where = changed.view(*changed.shape, *[1] * (value.ndim - 2))
            given[name] = torch.where(where, turned, value)
        leaves = tree_leaves(model(**given))
        return [_at_tokens(leaf, mask.kept) for leaf in leaves if isinstance(leaf, Tensor)]

    for mask in masks.values():
        with at_rest(model):
            nothing = torch.zeros_like(mask.kept)
            plain, *others = (run(mask, where) for where in (nothing, ~mask.kept, mask.kept))
        by_padding, by_tokens = (
            not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(plain, other, strict=True))
            for other in others
        )
        if by_padding or not by_tokens:
            name, (_, at_tokens) = mask.name, _MASKS[mask.name]
            seen = (
                "padding changes what the model gives at tokens"
                if by_padding
                else "what the model gives at tokens does not depend on them"
            )
            raise DataError(
                f"calibration: {name}: expected {at_tokens:d} at tokens and {not at_tokens:d} at "
                f"padding, but {seen}: {_WAY_OUT}"
            )


def _at_tokens(output: Tensor, mask: Tensor) -> Tensor:
    """An output where `mask` [B, T] is true; all of it where it has no tokens."""
    if output.shape[:2] == mask.shape:
        return output[mask]
    if output.shape[:2] == mask.T.shape:
        return output.transpose(0, 1)[mask]
    return output[mask.flatten()] if output.shape[:1] == (mask.numel(),) else output


def _side_of(model: nn.Module, name: str) -> str:
    """Whose tokens an argument [B, T, …] is of."""
    if name in _MASKS:
        return _MASKS[name][0]
    if name == "labels" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "decoder"
    return _SIDES.get(name.partition("_")[0], "text")


def _split(model: nn.Module, batch: Batch, masks: Mapping[str, _Mask]) -> Iterator[Batch]:
    """The runs of rows with the same padding, without it."""
    kept = list(zip(*(mask.kept.tolist() for mask in masks.values()), strict=True))
    packed = rows_of_packed(batch, len(kept))
    for own, run in groupby(range(len(kept)), kept.__getitem__):
        rows = list(run)
        if not all(any(side) for side in own):
            continue
        spans = {side: _span(flags) for side, flags in zip(masks, own, strict=True)}
        made = {}
        for name, value in batch.items():
            if name in packed:
                made[name] = torch.cat([packed[name][row] for row in rows])
            elif isinstance(value, Tensor) and value.ndim:
                side = _side_of(model, name)
                span = (spans[side], masks[side].kept.shape[1]) if side in masks else None
                made[name] = _cut(name, value, slice(rows[0], rows[-1] + 1), len(kept), span)
            else:
                made[name] = value
        yield made


def _span(kept: Sequence[bool]) -> slice:
    """Where a row's tokens are.

    Raises:
        DataError: there is padding between them.
    """
    start = kept.index(True)
    span = slice(start, start + sum(kept))
    if not all(kept[span]):
        raise DataError(
            "calibration: expected padding before or behind the tokens of a sample, got some "
            f"between them: {_WAY_OUT}"
        )
    return span


def _cut(
    name: str, value: Tensor, rows: slice, size: int, span: tuple[slice, int] | None
) -> Tensor:
    """These rows of an argument that has `size` of them, or one for all.

    Args:
        name: of the argument.
        value: of the argument.
        rows: which ones are kept.
        size: how many there are.
        span: which tokens are kept, and how many there are; None: all of them.

    Raises:
        DataError: the argument has another number of rows.
    """
    if name in _POSITIONS:
        if value.ndim > 1 and value.shape[-2] == size:
            value = value[..., rows, :]
        return value if span is None else value[..., span[0]]
    if len(value) not in (1, size):
        raise DataError(
            f"calibration: {name}: expected a row for each of {size} padded samples, got "
            f"{list(value.shape)}: {_WAY_OUT}"
        )
    value = value[rows] if len(value) == size else value
    cut = span is not None and value.ndim > 1 and value.shape[1] == span[1]
    return value[:, span[0]] if cut and span is not None else value
