"""A model larger than memory while it is pruned: layers are read, cut and written one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from prunekit.calibration.example import ExampleStates
from prunekit.checkpoint import LayerWriter, Shards, Weights, offloaded, open_streamed
from prunekit.errors import CheckpointError, ConfigError
from prunekit.graph import CouplingGraph, Group
from prunekit.model.inputs import without_cache
from prunekit.model.stack import main_stack, module_lists, stacks_around
from prunekit.runtime.background import Background
from prunekit.runtime.devices import compute_dtype
from prunekit.runtime.memory import return_freed
from prunekit.runtime.processes import rank
from prunekit.surgery import apply_to_layer


class Streamed:
    """A model on meta, its shards, and the folder its pruned layers go to.

    Args:
        source: the folder of the model.
        device: the device that layers are worked on.
        stored: the type that the result is stored in; the checkpoint's by default. Half precision
            is computed in float32 on a CPU.
        trust_remote_code: as for `from_pretrained`.
    """

    def __init__(
        self,
        source: str | Path,
        device: torch.device,
        stored: torch.dtype | None,
        trust_remote_code: bool,
    ) -> None:
        return_freed()
        self.stored = stored or Shards.of_folder(Path(source)).dtype
        self.dtype = compute_dtype(self.stored, device)
        self.device = device
        self.model, self.shards = open_streamed(source, self.dtype, trust_remote_code)
        self.weights = Weights(self.model, self.shards, device)
        self.writer: LayerWriter | None = None
        self.reading: Background[dict[str, Tensor]] = Background("prunekit-read")
        self.writing: Background[None] = Background("prunekit-write")

    def write_to(self, folder: Path, resume: bool) -> None:
        """Let the result go to a folder; of several processes the first one writes.

        Args:
            folder: the folder of the pruned model.
            resume: keep the layers that an unfinished run has left there; else they are removed.
        """
        if rank():
            return
        self.writer = LayerWriter(folder, self.stored, resume=True)
        if not resume:
            self.writer.abandon()
            self.writer = LayerWriter(folder, self.stored)

    def evaluated(self) -> AbstractContextManager[Weights]:
        """Let the model run inside a `with` block: dense before pruning, pruned afterwards."""
        written = self.writer is not None and bool(self.writer.parts)
        shards = self.writer.shards if written and self.writer else self.shards
        return offloaded(self.model, shards, self.device)

    def layers(self, graph: CouplingGraph) -> StreamedLayers:
        """The keeper of the layers: reads them one by one, cuts and writes each when it is left."""
        return StreamedLayers(self, graph)

    def check_layers(self) -> None:
        """Run what lies outside the layers on a few tokens, to see whether these can be apart.

        Raises:
            CheckpointError: a layer takes more than the hidden states of the one before it.
        """
        lists = module_lists(self.model)
        path = next((path for path in lists if lists[path] is main_stack(self.model)), None)
        if path is not None:
            inputs = without_cache(self.model, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
            with self.weights.outside(path):
                apart = ExampleStates.record(self.model, path, inputs, self.device)
        if path is None or apart is None:
            raise CheckpointError(
                f"{path or 'the model'}: the layers can't be run one by one; "
                "memory.stream=false loads the model whole"
            )

    def layers_path(self, graph: CouplingGraph) -> str:
        """The module path of the list that the groups' layers are in.

        Raises:
            ConfigError: there is none, or more than one.
        """
        modules = [group.module for group in graph.groups if group.layer is not None]
        paths = sorted(filter(None, stacks_around(self.model, modules)))
        if len(paths) != 1:
            raise ConfigError(
                "memory.stream: expected one list of decoder layers, "
                f"found {', '.join(paths) or 'none'}"
            )
        return paths[0]

    def write_behind(self, key: str) -> None:
        """Write a module in a thread, once the one before is written; it may be released at once.

        Raises:
            CheckpointError: the one before could not be written.
        """
        assert self.writer is not None
        self.writing.result()
        tensors = self.writer.gather(self.weights.state(key))
        self.writing.begin(partial(self.writer.write, key, tensors))

    def complete(self, graph: CouplingGraph) -> None:
        """Write the layers in which no group was cut, and all tensors outside the layers."""
        self.writing.result()
        if self.writer is None:
            return
        layers = self.layers(graph)
        left = [i for i in range(layers.count) if not self.writer.has(f"{layers.path}.{i}")]
        for i, following in pairwise([*left, layers.count]):
            layers.enter(i, following)
            layers.leave(i)
        self.writing.result()
        self.writer.copy(self.shards, self.weights.outside_names(layers.path))

    def settle(self) -> None:
        """Wait until nothing is read and nothing is written any more, however it ends."""
        self.reading.settle()
        self.writing.settle()


class StreamedLayers:
    """`prunekit.calibration.layers.Layers` over shards.

    A layer is read while the one before it is worked on; when it is left it is cut, checked and let
    go of, and written while the next one is worked on. So there is never more than one layer ahead
    and one behind in host memory.

    A layer is checked on the example that the model was traced with. Its hidden states, a few
    tokens, go through the layers beside those of the calibration set.
    """

    def __init__(self, streamed: Streamed, graph: CouplingGraph) -> None:
        self.streamed, self.graph = streamed, graph
        self.path = streamed.layers_path(graph)
        self.count = len(streamed.model.get_submodule(self.path))  # type: ignore[arg-type]
        self.removed: dict[int, dict[str, list[int]]] = defaultdict(dict)  # [layer][group name]
        self.example: ExampleStates | None = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Embeddings, the last norm, the head; what they make of the example is recorded."""
        self._read_ahead(0)
        model, device = self.streamed.model, self.streamed.device
        with self.streamed.weights.outside(self.path):
            inputs = self.graph.example_inputs
            self.example = ExampleStates.record(model, self.path, inputs, device)
            yield

    def enter(self, layer: int, following: int | None = None) -> None:
        """Bring a layer to the device, and begin to read the `following` one, by default the next.

        Raises:
            CheckpointError: a tensor is missing or has another shape, a shard is damaged.
            DataError: a weight is NaN or infinite.
        """
        fetched = self.streamed.reading.result()
        self.streamed.weights.load(f"{self.path}.{layer}", fetched=fetched)
        self._read_ahead(layer + 1 if following is None else following)

    def _read_ahead(self, layer: int) -> None:
        if layer < self.count:
            self.streamed.reading.begin(self.streamed.weights.fetcher(f"{self.path}.{layer}"))

    def remove(self, group: Group, units: Sequence[int]) -> None:
        """Note the units that a group of the layer in turn has lost; `leave` cuts them."""
        assert group.layer is not None
        if units:
            self.removed[group.layer][group.name] = list(units)

    def leave(self, layer: int) -> None:
        """Cut a layer, check that it computes what it did before, and write it.

        Raises:
            SurgeryError: the layer that was cut gives another output.
            CheckpointError: the layer before could not be written.
        """
        key = f"{self.path}.{layer}"
        if units := self.removed.pop(layer, {}):
            assert self.example is not None
            run = partial(self.example.run, layer)
            apply_to_layer(self.streamed.model, self.graph, units, run)
        if self.example is not None:
            self.example.advance(layer)
        writer = self.streamed.writer
        if writer and not writer.has(key):
            self.streamed.write_behind(key)
        self.streamed.weights.release(key)
