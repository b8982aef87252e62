"""A language model as a function of tensors, as an ONNX graph holds it: with or without cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from prunekit.errors import ExportError, first_line
from prunekit.model.compat import read
from prunekit.model.inputs import longest, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Graph(nn.Module):
    """What is exported: tensors in, tensors out.

    Attributes:
        model: the language model, in the type of the graph; a copy where that is another one.
        names: the inputs that every token has, by their names as arguments of the model.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        if any(p.dtype != dtype for p in model.parameters()):
            self.model = copy.deepcopy(model)
            nn.Module.to(self.model, dtype)
        accepted = inspect.signature(model.forward).parameters
        self.names = [n for n in ("input_ids", "attention_mask") if n in accepted]

    @property
    def inputs(self) -> list[str]:
        """The names of all inputs of the graph."""
        return self.names

    @property
    def outputs(self) -> list[str]:
        """The names of all outputs of the graph."""
        return ["logits"]

    @property
    def axes(self) -> tuple[dict[int, str], ...]:
        """The axes of any size of each input, with their names."""
        return tuple({0: "batch", 1: "sequence"} for _ in self.names)

    def example(self, rows: int, length: int, past: int) -> tuple[Tensor, ...]:
        """Inputs of `length` tokens after `past` ones, which a graph without a cache has not.

        The tokens are int64 [rows, length]; with a mask, the first row is padded on the left.
        """
        ids = torch.arange(rows * length, device=self.model.device).view(rows, length)
        ids = ids % self.model.config.vocab_size
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        return (ids, mask)[: len(self.names)]

    def compute(self, values: Mapping[str, Tensor]) -> Tensor:
        """The logits [batch, sequence, vocabulary] of the model itself, without a cache."""
        given = {name: values[name] for name in self.names}
        return self.model(**given, use_cache=False).logits

    def run(self, session: Any, values: Mapping[str, Tensor]) -> Tensor:
        """The logits of onnxruntime's session of the graph."""
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        return torch.from_numpy(session.run(["logits"], arrays)[0])


class Prefill(Graph):
    """A language model without a cache: every call computes all positions."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """The logits of the inputs that `names` lists."""
        return self.compute(dict(zip(self.names, inputs, strict=True)))


class Cached(Graph):
    """A language model whose cache goes in and comes out.

    Inputs are input_ids and, where the model takes them, position_ids [batch, sequence],
    attention_mask [batch, past + sequence], and for each layer i `past_key_values.i.key` and
    `.value` [batch, heads, past, width]. Outputs are the logits and `present.i.key` and `.value`
    [batch, heads, past + sequence, width]. A layer without attention keeps a zero for each token.

    Attributes:
        sizes: heads and width of the keys of each layer, then those of its values, in turns.

    Raises:
        ExportError: the model keeps something else than keys and values of every token.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        accepted = inspect.signature(model.forward).parameters
        self.names += [n for n in ("position_ids",) if n in accepted]
        self.sizes = _sizes_of_cache(self.model)

    @property
    def inputs(self) -> list[str]:
        """The names of all inputs of the graph."""
        return [*self.names, *self._kept("past_key_values")]

    @property
    def outputs(self) -> list[str]:
        """The names of all outputs of the graph."""
        return ["logits", *self._kept("present")]

    def _kept(self, prefix: str) -> list[str]:
        layers = len(self.sizes) // 2
        return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]

    @property
    def axes(self) -> tuple[dict[int, str], ...]:
        """The axes of any size of each input, with their names."""
        tokens = {0: "batch", 1: "sequence"}
        own = (tokens | {1: "total"} if n == "attention_mask" else tokens for n in self.names)
        return (*own, *({0: "batch", 2: "past"} for _ in self.sizes))

    def example(self, rows: int, length: int, past: int) -> tuple[Tensor, ...]:
        """Inputs of `length` tokens after `past` ones, whose keys and values are random."""
        ids, mask = super().example(rows, length, past)[:2]
        mask = torch.cat([torch.ones_like(mask)[:, :1].expand(-1, past), mask], dim=1)
        places = torch.arange(past, past + length, device=ids.device).expand(rows, -1)
        made = {"input_ids": ids, "attention_mask": mask, "position_ids": places.contiguous()}
        dtype = next(self.model.parameters()).dtype
        kept = (
            torch.randn(rows, heads, past, width, dtype=dtype, device=ids.device)
            for heads, width in self.sizes
        )
        return (*(made[name] for name in self.names), *kept)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The logits, then the keys and values of all layers."""
        given = dict(zip(self.names, inputs, strict=False))
        cache = _cache_of(inputs[len(self.names) :])
        logits = self.model(**given, past_key_values=cache, use_cache=True).logits
        return (logits, *(kept for layer in cache.layers for kept in (layer.keys, layer.values)))

    def run(self, session: Any, values: Mapping[str, Tensor]) -> Tensor:
        """The logits of all tokens but the last one, and of that one with what was kept."""
        length = values["input_ids"].shape[1]
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        kept = {name: arrays[name] for name in self.inputs[len(self.names) :]}
        parts = []
        for part in (slice(0, length - 1), slice(length - 1, length)):
            given = {name: arrays[name][:, part] for name in self.names}
            given["attention_mask"] = arrays["attention_mask"][:, : part.stop]
            logits, *presents = session.run(self.outputs, given | kept)
            kept = dict(zip(kept, presents, strict=True))
            parts.append(torch.from_numpy(logits))
        return torch.cat(parts, dim=1)

    def describe(self) -> dict[str, Any]:
        """The `genai_config.json` by which onnxruntime-genai runs the graph."""
        config = text_config(self.model)
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        given: dict[str, Any] = {name: getattr(config, name, None) for name in special}
        if given["pad_token_id"] is None:
            ends = given["eos_token_id"]
            given["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
        heads, width = self.sizes[0]
        length = longest(self.model) or 2048
        names = {name: name for name in self.names}
        for part in ("key", "value"):
            names[f"past_{part}_names"] = f"past_key_values.%d.{part}"
        decoder = {
            "filename": "model.onnx",
            "head_size": width,
            "hidden_size": read(config, "hidden_size"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "num_hidden_layers": len(self.sizes) // 2,
            "inputs": names,
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        }
        model = {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": length,
            "decoder": decoder,
            **{name: value for name, value in given.items() if value is not None},
        }
        # The graph makes new tensors for what it keeps, as it has one more token at each run.
        search = {"max_length": length, "past_present_share_buffer": False}
        return {"model": model, "search": search}


def _cache_of(kept: tuple[Tensor, ...]) -> Any:
    """A cache of transformers that holds these keys and values, in turns, of each layer."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(kept[::2], kept[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


@torch.no_grad()
def _sizes_of_cache(model: Any) -> list[tuple[int, int]]:
    """Heads and width of the keys and of the values of each layer, in turns.

    Raises:
        ExportError: some layer keeps something else than keys and values of every token.
    """
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    ids = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    name = type(model).__name__
    try:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:  # whatever a model says to a cache that it has no use for
        raise ExportError(
            f"export.cache: {name} keeps no plain keys and values: {first_line(error, named=True)}"
        ) from error
    layers: list[Any] = list(cache.layers)
    kept = [getattr(layer, part, None) for layer in layers for part in ("keys", "values")]
    sizes = [(t.shape[1], t.shape[3]) for t in kept if _is_of_every_token(t, len(ids[0]))]
    if not sizes or len(sizes) < len(kept):
        raise ExportError(
            f"export.cache: expected keys and values [batch, heads, tokens, width] of each layer "
            f"of {name}, got {', '.join(map(str, layers)) or 'nothing'}"
        )
    return sizes


def _is_of_every_token(kept: Any, tokens: int) -> TypeGuard[Tensor]:
    """Whether this is a tensor [1, heads, tokens, width]."""
    return isinstance(kept, Tensor) and kept.ndim == 4 and kept.shape[2] == tokens
