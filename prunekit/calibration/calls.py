"""The calls of the layers: the arguments beside the hidden states, of each layer and batch.

They are recorded without running a layer: stand-ins note their arguments and pass the hidden states
on. A layer whose other arguments depend on the results of the layers before it can't be run by
itself: a second recording, with stand-ins that change the hidden states, shows whether they do. It
goes on behind the last layer, as far as the head: layers that a model goes through again have
several inputs. What layers hand on beside the hidden states (T5's position bias, say, which its
first layer computes for all), in arguments or in attributes of an object that they share, shows
where two rows of the batches go through the layers in turn, beside the model itself; without the
weights, a third recording shows what is handed on in arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.hooks import Stop, replacing
from prunekit.calibration.store import Kept, Store
from prunekit.data.batches import Batch, Numbered, copy_batch, count_positions, take_rows
from prunekit.model.stack import hidden_of_output, layers_in

_tree = torch.utils._pytree
# What a layer may return: its hidden states, and something else, which is None where there is no
# cache and where the weights of the attention are not asked for.
_RETURNED: tuple[Callable[[Tensor, object], Any], ...] = (
    lambda hidden, other: hidden,
    lambda hidden, other: (hidden,),
    lambda hidden, other: (hidden, other),
    lambda hidden, other: (hidden, other, other),
)
_MARK = object()  # stands for something else in a recording that shows where it goes


@dataclass(frozen=True)
class LayerCall:
    """The call of a layer on a batch, without its hidden states.

    `key`: the name of the hidden states; None where they are the first positional argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None

    def make(self, layer: nn.Module, hidden: Tensor) -> Any:
        """Call a layer with these hidden states [B, T, size]."""
        if self.key is None:
            return layer(hidden, *self.args, **self.kwargs)
        return layer(*self.args, **{**self.kwargs, self.key: hidden})


@dataclass(frozen=True)
class Recording:
    """What goes into the layers: `hidden` [batch] before the first one, `calls` [batch][layer].

    `written`: whether layers may write to dicts or lists that they are given, for others to read:
    those of a batch must then go through the layers in order, and each layer be run once on them.
    """

    hidden: list[Kept]
    calls: list[list[LayerCall]]
    written: bool = False

    def free(self) -> None:
        """Let go of the hidden states."""
        for kept in self.hidden:
            kept.free()


def record_calls(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[Numbered], store: Store
) -> Recording | None:
    """Record the calls of the layers; None where they can't be run one by one.

    Layers return their hidden states alone, or in a tuple with what the layers behind them are not
    given, or do as well without (a cache that is None): each form is tried.
    """
    for returned in _RETURNED:
        recording = _record_batches(model, layers, batches, store, returned)
        if recording is not None:
            return recording
    return None


def _record_batches(
    model: nn.Module,
    layers: nn.ModuleList,
    batches: Sequence[Numbered],
    store: Store,
    returned: Callable[[Tensor, object], Any],
) -> Recording | None:
    recording = Recording([], [])
    for _, batch in batches:
        recorder = _record_batch(model, layers, batch, returned)
        if recorder is None or recorder.first is None:
            recording.free()
            return None
        recording.hidden.append(store.put(recorder.first))
        before = recording.calls[-1] if recording.calls else None
        recording.calls.append(_share_tensors(recorder.calls, before))
    first = batches[0][1]
    again = _record_batch(model, layers, first, returned, changing=True)
    sound = again is not None and _equal_tensors(recording.calls[0], again.calls)
    if sound and any(parameter.is_meta for parameter in layers.parameters()):
        marked = _record_batch(model, layers, first, returned, other=_MARK)
        sound = marked is not None and all(leaf is not _MARK for leaf in arguments(marked.calls))
        recording = replace(recording, written=bool(_containers(recording.calls[0])))
    elif sound:
        given = [batch for _, batch in batches]
        sound, written = _equal_whole(model, layers, given, returned)
        recording = replace(recording, written=written)
    if not sound:
        recording.free()
        return None
    return recording


def arguments(calls: Sequence[LayerCall]) -> list[Any]:
    """All arguments of the calls, one after another."""
    return _tree.tree_leaves([(call.args, call.kwargs) for call in calls])


@torch.no_grad()
def _equal_whole(
    model: nn.Module,
    layers: nn.ModuleList,
    batches: Sequence[Batch],
    returned: Callable[[Tensor, object], Any],
) -> tuple[bool, bool]:
    """Whether layers, run one by one on two rows in turn, give what they give inside the model.

    Also, whether they wrote to dicts or lists that they were given.

    The rows are the first of the first batch and the last of the last one, or these batches where
    the model takes no rows of them: a layer that others leave something behind for finds that of
    the other row. What differs is run by the model again, to tell what differs by chance, as sums
    on a GPU may.
    """
    last = count_positions(batches[-1])[0] - 1
    rows = [take_rows(batches[0], [0]), take_rows(batches[-1], [last])]
    try:
        wholes = [_run_whole(model, layers, row) for row in rows]
    except Exception:
        rows = [batches[0], batches[-1]]
        wholes = [_run_whole(model, layers, row) for row in rows]
    recorders = [_record_batch(model, layers, row, returned) for row in rows]
    states: list[Tensor] = []
    for recorder in recorders:
        if recorder is None or recorder.first is None:
            return False, False
        states.append(recorder.first)
    found = [one for recorder in recorders if recorder for one in _containers(recorder.calls)]
    before = [_content(container) for container in found]
    try:
        for i, layer in layers_in(layers).items():
            for k, recorder in enumerate(recorders):
                assert recorder is not None
                output = hidden_of_output(recorder.calls[i].make(layer, states[k]))
                assert output is not None
                states[k] = output
    except Exception:  # a layer can't do without what others return
        return False, False
    written = before != [_content(container) for container in found]
    for row, hidden, whole in zip(rows, states, wholes, strict=True):
        difference = (hidden - whole).abs().max()
        if difference != 0:
            again = _run_whole(model, layers, row)
            if not difference <= 4 * (again - whole).abs().max():
                return False, False
    return True, written


def _run_whole(model: nn.Module, layers: nn.ModuleList, batch: Batch) -> Tensor:
    """The hidden states behind the last layer, as the model runs it."""
    seen: list[Tensor] = []

    def stop(layer: nn.Module, args: Any, output: Any) -> None:
        hidden = hidden_of_output(output)
        assert hidden is not None
        seen.append(hidden.clone())
        raise Stop

    with layers[-1].register_forward_hook(stop), suppress(Stop):
        model(**copy_batch(batch))
    return seen[0]


@torch.no_grad()
def _record_batch(
    model: nn.Module,
    layers: nn.ModuleList,
    batch: Batch,
    returned: Callable[[Tensor, object], Any],
    *,
    other: object = None,
    changing: bool = False,
) -> _Recorder | None:
    """Run the model with stand-ins for its layers; None where not all are called, in order."""
    recorder = _Recorder(len(layers), lambda hidden: returned(hidden, other), changing)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    with ExitStack() as stack:
        for i, layer in layers_in(layers).items():
            stack.enter_context(replacing(layer, partial(recorder.stand_in, i)))
        if isinstance(head, nn.Module):
            stack.enter_context(replacing(head, _stop))
        try:
            model(**copy_batch(batch))
        except Stop:
            pass
        except Exception:  # the model takes something else from a layer
            if not recorder.complete:
                return None
    return recorder if recorder.complete and not recorder.repeated else None


def _stop(*args: Any, **kwargs: Any) -> Any:
    """A forward method that ends the forward pass."""
    raise Stop


class _Recorder:
    """Notes the calls of stand-ins that pass on the hidden states they are given.

    Args:
        num_layers: how many layers there are.
        give_back: makes what the stand-ins return of the hidden states.
        changing: whether the hidden states passed on are others than those given; then the forward
            pass goes on behind the last layer, where it ends otherwise.

    Attributes:
        first: the hidden states before the first layer.
        calls: one for each layer called so far.
        repeated: whether a layer was called behind the last one.
    """

    def __init__(self, num_layers: int, give_back: Callable[[Tensor], Any], changing: bool) -> None:
        self.num_layers, self.give_back, self.changing = num_layers, give_back, changing
        self.first: Tensor | None = None
        self.calls: list[LayerCall] = []
        self.repeated = False
        self._passed_on: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether all layers were called, in order."""
        return len(self.calls) == self.num_layers

    def stand_in(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """The forward method of one layer's stand-in.

        Raises:
            Stop: after the last layer; or where the layer can't be run by its own call alone: it is
                out of order, is not given what the layer before it returned, or gets it twice.
        """
        key = None if args else "hidden_states"
        hidden = args[0] if key is None else kwargs.pop(key)
        others = _tree.tree_leaves((args[1:], kwargs))
        chained = isinstance(hidden, Tensor) if self.first is None else hidden is self._passed_on
        self.repeated = self.complete
        if layer != len(self.calls) or not chained or any(other is hidden for other in others):
            raise Stop
        if self.first is None:
            self.first = hidden.clone()
        self.calls.append(LayerCall(args[1:], kwargs, key))
        if self.complete and not self.changing:
            raise Stop
        # An argument that changes too depends on the hidden states: on their order, perhaps.
        self._passed_on = self._change(hidden) if self.changing else hidden
        return self.give_back(self._passed_on)

    def _change(self, hidden: Tensor) -> Tensor:
        """Other hidden states, with no value, sign or order of values in common."""
        generator = torch.Generator().manual_seed(len(self.calls))
        noise = torch.randn(hidden.shape, generator=generator).to(hidden)
        return hidden * noise + noise


def _containers(calls: Sequence[LayerCall]) -> list[Any]:
    """The dicts and lists among the arguments of calls, and inside of these."""
    found: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, dict | list):
            found.append(value)
        if isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                look(part)

    for call in calls:
        look((call.args, *call.kwargs.values()))
    return found


def _content(container: Any) -> list[Any]:
    """What a dict or a list holds: its keys, and which values."""
    values = container.values() if isinstance(container, dict) else container
    keys = list(container) if isinstance(container, dict) else []
    return [*keys, *map(id, values)]


def copy_containers(calls: Sequence[LayerCall]) -> list[LayerCall]:
    """The calls of all layers on a batch, with dicts and lists of their own for layers to write to.

    One that several layers are given stays one; tensors stay the same.
    """
    copies: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(copied(part) for part in value)
        if not isinstance(value, dict | list):
            return value
        if id(value) not in copies:
            copies[id(value)] = own = copy.copy(value)
            for key in value if isinstance(value, dict) else range(len(value)):
                own[key] = copied(value[key])
        return copies[id(value)]

    return [replace(call, args=copied(call.args), kwargs=copied(call.kwargs)) for call in calls]


def _share_tensors(
    calls: Sequence[LayerCall], before: Sequence[LayerCall] | None
) -> list[LayerCall]:
    """Replace tensors by equal ones of the batch before, so that each is kept once (masks, say)."""
    if before is None:
        return list(calls)
    shared = []
    for call, last in zip(calls, before, strict=True):
        kwargs = {name: _share(value, last.kwargs.get(name)) for name, value in call.kwargs.items()}
        shared.append(LayerCall(call.args, kwargs, call.key))
    return shared


def _share(value: Any, last: Any) -> Any:
    """`last` where it equals `value`; tuples part by part."""
    if isinstance(value, tuple) and isinstance(last, tuple) and len(value) == len(last):
        return tuple(_share(own, other) for own, other in zip(value, last, strict=True))
    if not isinstance(value, Tensor) or not isinstance(last, Tensor) or value.shape != last.shape:
        return value
    return last if value is last or torch.equal(value, last) else value


def _equal_tensors(left: Sequence[LayerCall], right: Sequence[LayerCall]) -> bool:
    """Whether two recordings of the same batch hold equal tensors."""
    return all(
        one.shape == two.shape and torch.equal(one, two)
        for one, two in zip(arguments(left), arguments(right), strict=False)
        if isinstance(one, Tensor) and isinstance(two, Tensor)
    )
