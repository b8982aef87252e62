"""Rows of an embedding and its head that no token needs: cut, and checked.

Which token a row stands for is known outside of the traced weights, so that this is no cut of a
group: the ids of the tokens that stay are counted anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import SurgeryError, first_line
from prunekit.model.attributes import resize
from prunekit.model.inputs import without_cache
from prunekit.model.ties import Place, parameter_places
from prunekit.runtime.modes import at_rest
from prunekit.runtime.precision import computing_in
from prunekit.surgery.changes import Changes
from prunekit.surgery.cut import slice_tensor

_TOLERANCE = 1e-4  # of the largest logit: products of other sizes add up in another order
_ENDINGS = ("_token_id", "_token_ids", "_token_index")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")  # ids that need no row of their own


def vocabulary_rows(model: Any) -> int:
    """The number of rows of a model's embedding.

    Raises:
        SurgeryError: the model has no embedding of tokens.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None or getattr(embedding, "weight", None) is None:
        raise SurgeryError(
            "groups=vocabulary: expected a language model with an embedding of tokens, "
            f"got {type(model).__name__}"
        )
    return int(embedding.weight.shape[0])


def special_ids(model: nn.Module) -> set[int]:
    """The token ids that a model's config and its generation config name and that have a row."""
    found = set()
    for config in _configs(model):
        for name, value in vars(config).items():
            if name.endswith(_ENDINGS):
                found |= set(value) if isinstance(value, list | tuple) else {value}
    rows = vocabulary_rows(model)
    return {index for index in found if type(index) is int and 0 <= index < rows}


def cut_vocabulary(model: nn.Module, kept: Tensor) -> None:
    """Keep some rows of a model's embedding and its head, in place; ids are counted anew.

    Config and generation config follow: the size of the vocabulary, and all special ids. Where the
    model has no head over the tokens (a classifier), its outputs stay as they are.

    Args:
        model: a model of transformers that reads tokens.
        kept: int64 [K], rising: the ids that stay, all of `special_ids` among them.

    Raises:
        SurgeryError: the head has another number of rows, a special id would go, or the cut model's
            logits are not the old ones of the tokens that stay; the model is then as it was. It
            does not run on tokens alone.
    """
    rows = vocabulary_rows(model)
    if missing := special_ids(model) - set(kept.tolist()):
        raise SurgeryError(f"groups=vocabulary: expected special ids to stay, {missing} would go")
    example = _example(kept)
    before = _run(model, kept[example])
    if model.get_output_embeddings() is not None:  # type: ignore[operator]
        before = before[..., kept]
    changes = Changes(model)
    try:
        _cut_rows(model, rows, kept, changes)
        _follow(model, rows, kept, changes)
        _compare(before, _run(model, example))
    except BaseException:
        changes.undo()
        raise


def _example(kept: Tensor) -> Tensor:
    """New ids [2, 8], drawn from all of them."""
    return torch.randint(len(kept), (2, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _run(model: Any, ids: Tensor) -> Tensor:
    """The first output in float32 and in host memory, of ids [2, 8]: logits, where there are any.

    Raises:
        SurgeryError: the model does not run on them.
    """
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": ids.to(device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    try:
        with at_rest(model), computing_in(torch.float32, device):
            output: Tensor = model(**without_cache(model, inputs))[0]
    except Exception as error:  # whatever a model raises
        raise SurgeryError(
            f"groups=vocabulary: expected a model that runs on tokens alone, "
            f"{type(model).__name__} does not: {first_line(error)}"
        ) from error
    return output.float().cpu()


def _compare(before: Tensor, after: Tensor) -> None:
    if before.shape == after.shape:
        difference = (before - after).abs().max() / before.abs().max()
        if difference <= _TOLERANCE:
            return
    raise SurgeryError(
        "groups=vocabulary: the cut model's logits are not the old ones of the tokens that stay: "
        "something beside the embedding and the head depends on token ids"
    )


def _cut_rows(model: Any, rows: int, kept: Tensor, changes: Changes) -> None:
    """Cut the embedding's weight, the head's weight and the head's bias, wherever they are held."""
    gone = torch.ones(rows, dtype=torch.bool)
    gone[kept] = False
    removed = {0: gone.nonzero().flatten()}
    for places in _vocabulary_tensors(model).values():
        size = getattr(places[0].module, places[0].attribute).shape[0]
        if size != rows:
            raise SurgeryError(
                f"groups=vocabulary: expected {places[0].name} to have the embedding's {rows} rows,"
                f" it has {size}"
            )
        slice_tensor(places, removed, changes)
    for module in model.modules():  # BART and its kin add it to their logits
        bias = module._buffers.get("final_logits_bias")
        if bias is not None and bias.shape[-1] == rows:
            changes.set(module, "final_logits_bias", bias[..., kept.to(bias.device)])


def _vocabulary_tensors(model: Any) -> Mapping[str, list[Place]]:
    """Name → places of what has a row for each token."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules = {id(module) for module in ends if module is not None}
    return {
        name: places
        for name, places in parameter_places(model).items()
        if any(id(place.module) in modules for place in places)
    }


def _follow(model: Any, rows: int, kept: Tensor, changes: Changes) -> None:
    """Bring sizes and ids in line, in modules and configs."""
    sizes = dict.fromkeys(("vocab_size", "decoder_vocab_size"), (rows, len(kept)))
    configs = list(_configs(model))
    resize([*configs, *model.modules()], sizes, changes.set)
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    for config in configs:
        for name, value in list(vars(config).items()):
            if name.endswith(_ENDINGS) or name in _LISTS:
                changes.set(config, name, _renumber(value, new_ids))
    for module in model.modules():
        if type(padding := module.__dict__.get("padding_idx")) is int:
            changes.set(module, "padding_idx", new_ids.get(padding, padding))


def _renumber(value: Any, new_ids: Mapping[int, int]) -> Any:
    """An id, or those of a list that stay, counted anew; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(new_ids[index] for index in value if index in new_ids)
    return new_ids.get(value, value) if type(value) is int else value


def _configs(model: Any) -> Iterator[Any]:
    """The model's config, those inside it, and the generation config; each once."""
    pending, seen = [model.config, getattr(model, "generation_config", None)], set[int]()
    while pending:
        config = pending.pop()
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        pending += [value for value in vars(config).values() if hasattr(value, "to_diff_dict")]
