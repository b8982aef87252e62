"""The example inputs that a model is traced and checked with."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from prunekit.errors import TraceError
from prunekit.graph.capture import InputsError
from prunekit.graph.coupling import CouplingGraph
from prunekit.graph.tracer import trace
from prunekit.model.inputs import longest, rows_of_packed
from prunekit.model.parts import find_language_part, image_tokens

_ROWS, _TOKENS = 2, 8  # of an example
_UNTRACEABLE = (TraceError, GuardOnDataDependentSymNode)
_UNSEEN = "the model can't be traced with what it sees, which may be coupled to it"
# Arguments [samples, tokens] of language models: tokens may go where a batch has no other tensors.
_TEXT = {
    *("input_ids", "attention_mask", "position_ids", "token_type_ids"),
    *("decoder_input_ids", "decoder_attention_mask"),
}
_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def trace_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    check: Callable[[CouplingGraph], None] = lambda _: None,
) -> CouplingGraph:
    """Trace a model with a small example of a batch: two samples, of plain text eight tokens each.

    Labels are left out where the model does without. Where it does not run on the smaller example,
    the next larger one is tried, and masks of ones where torch.export can't follow how it makes
    them. Where the first dims of its arguments are no samples (the nodes of a graph, time), the
    batch is taken as it is. Where a model that also sees or hears can't be traced with what it
    sees, its language model is traced with text alone.

    Args:
        model: the model.
        batch: keyword arguments of its forward call.
        check: raises TraceError where the example of a graph won't do.

    Raises:
        TraceError: the model can't be traced with two whole samples, nor with all of them.
    """

    def trace_checked(example: Mapping[str, Any]) -> CouplingGraph:
        graph = trace(model, example)
        check(graph)
        return graph

    *smaller, whole = examples_of(model, batch)
    for example in smaller:
        try:
            return trace_checked(example)
        except _UNTRACEABLE:
            continue
    try:
        return trace_checked(whole)
    except _UNTRACEABLE as error:
        masks = _make_masks(model, batch) if isinstance(error, InputsError) else {}
        if masks:
            with suppress(*_UNTRACEABLE):
                return trace_checked(next(examples_of(model, {**batch, **masks})))
        if not _tensor_names(batch) <= _TEXT and _sizes(batch) != _sizes(_first_samples(batch)):
            with suppress(*_UNTRACEABLE):
                return trace_checked(batch)
        graph = _trace_text(model, batch)
        if graph is None:
            raise
        return graph


def _make_masks(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that a batch lacks and a model makes by itself, of which tracing may keep it."""
    taken = inspect.signature(model.forward).parameters
    masks = {}
    for ids, mask in _MASKS.items():
        tokens = batch.get(ids)
        if isinstance(tokens, Tensor) and mask in taken and mask not in batch:
            masks[mask] = torch.ones_like(tokens)
    return masks


def _trace_text(model: nn.Module, batch: Mapping[str, Any]) -> CouplingGraph | None:
    """The groups inside the layers of the language model, traced without what the model sees.

    Whatever lies outside of these layers may be coupled to what was not traced. None where the
    model is nothing but a language model, and where it can't be traced so.
    """
    ids = batch.get("input_ids")
    if find_language_part(model) is None or not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    text = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    marks = torch.tensor(sorted(image_tokens(model)), device=ids.device)
    plain = ids[~torch.isin(ids, marks)]
    if not len(plain):
        return None
    text["input_ids"] = torch.where(torch.isin(ids, marks), plain[0], ids)
    try:
        graph = trace(model, next(examples_of(model, text)))
    except _UNTRACEABLE:
        return None
    pinned = {"prunable": False, "exact": False, "reason": _UNSEEN}
    groups = (g if g.layer is not None else replace(g, **pinned) for g in graph.groups)  # type: ignore[arg-type]
    return replace(graph, groups=tuple(groups))


def examples_of(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The examples of a batch to try one after another, each larger than the one before."""
    samples = _first_samples(batch)
    unlabelled = _leave_out_labels(model, samples)
    tensors = _tensor_names(unlabelled)
    if "input_ids" in tensors and tensors <= _TEXT:
        short = {name: _shorten(value, unlabelled) for name, value in unlabelled.items()}
        if any(short[name].shape != unlabelled[name].shape for name in tensors):
            yield short
    yield unlabelled
    if unlabelled.keys() != samples.keys():
        yield samples


def _tensor_names(batch: Mapping[str, Any]) -> set[str]:
    return {name for name, value in batch.items() if isinstance(value, Tensor)}


def _sizes(batch: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in batch.items() if isinstance(value, Tensor)}


def longer_example(
    model: nn.Module, batch: Mapping[str, Any], graph: CouplingGraph
) -> dict[str, Any] | None:
    """The first samples of a batch, where the example that a graph was traced with is shorter.

    With longer samples a model may go another way; None where the example has their length.
    """
    example, whole = graph.example_inputs, _leave_out_labels(model, _first_samples(batch))
    traced = example.get("input_ids") if isinstance(example, Mapping) else None
    tokens = whole.get("input_ids")
    if not isinstance(traced, Tensor) or not isinstance(tokens, Tensor):
        return None
    return whole if tokens.shape[1:] != traced.shape[1:] else None


def twice_as_long(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The first sample of a batch, repeated to twice its length along one of its dims.

    A model may go another way with inputs longer than those it is calibrated with. Which dim is a
    length isn't known: the model may not take what is given. None are given that hold images, or
    more tokens than the model was made for.
    """
    samples = _leave_out_labels(model, _first_samples(batch))
    tensors = [value for value in samples.values() if isinstance(value, Tensor)]
    first = next((tensor for tensor in tensors if 2 <= tensor.ndim <= 3), None)
    limit = longest(model)
    for length in () if first is None else first.shape[1:]:
        if length == 1 or (limit is not None and 2 * length > limit):
            continue

        def repeat(value: Any, length: int = length) -> Any:
            if not isinstance(value, Tensor) or not value.ndim:
                return value
            times = [1, *(1 + (size == length) for size in value.shape[1:])]
            return (value[:1] if len(value) == _ROWS else value).repeat(times)

        yield {name: repeat(value) for name, value in samples.items()}


def _leave_out_labels(model: nn.Module, samples: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in samples.items() if k != "labels" or not _is_optional(model, k)}


def _first_samples(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first two samples of a batch, twice the same one where it has no other."""
    sizes = Counter(
        len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim
    )
    rows = sizes.most_common(1)[0][0] if sizes else 0
    packed = rows_of_packed(batch, rows)

    def take(name: str, value: Any) -> Any:
        if name in packed:
            return torch.cat((packed[name] * _ROWS)[:_ROWS])
        if not isinstance(value, Tensor) or not value.ndim or len(value) != rows:
            return value
        return value[:_ROWS] if rows > 1 else torch.cat([value, value])

    return {name: take(name, value) for name, value in batch.items()}


def _shorten(value: Any, example: Mapping[str, Any]) -> Any:
    """The tokens of a text [samples, tokens] where the fewest of them are padding."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] <= _TOKENS:
        return value
    mask = example.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != value.shape:
        return value[:, :_TOKENS]
    start = int(mask.sum(0).unfold(0, _TOKENS, 1).sum(1).argmax())
    return value[:, start : start + _TOKENS]


def _is_optional(model: nn.Module, name: str) -> bool:
    """Whether a model's forward pass does without an argument."""
    argument = inspect.signature(model.forward).parameters.get(name)
    return argument is not None and argument.default is not inspect.Parameter.empty
