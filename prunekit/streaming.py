"""A model that memory need not hold: layers come from the shards on disk one by one and are written before the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.checkpoint import LayerWriter, Shards, Weights, offloaded, open_streamed
from prunekit.compensation.store import free_bytes
from prunekit.config import RunConfig, build
from prunekit.console import say
from prunekit.errors import CheckpointError, ConfigError, SurgeryError
from prunekit.graph import CouplingGraph
from prunekit.machine import return_freed
from prunekit.parallel import add_up, rank
from prunekit.surgery import TOLERANCE, cut_layer

_SHARE = 0.6  # of the free memory that a whole model may take before it is streamed by itself


def obstacle(config: RunConfig) -> str | None:
    """What of the configuration needs the whole model in memory."""
    from prunekit.importance import LayerImportance
    from prunekit.schedules import Layerwise

    if not isinstance(build(config.importance, "importance"), LayerImportance):
        return "an importance that scores all layers at once; expected importance=obs"
    if not isinstance(build(config.schedule, "schedule"), Layerwise):
        return "schedule=oneshot; expected layerwise"
    if config.recovery.get("_target_"):
        return "a recovery; expected recovery=none, and task=recover on the result"
    if build(config.policy, "policy").measures:
        return "a policy that measures the model; expected one of shapes over the depth"
    if config.scope.get("ranking", "local") != "local" or config.scope.get("rounds", 1) != 1:
        return "groups that compete; expected scope.ranking=local and one round"
    return "target.latency" if config.target.name == "latency" else None


def stream(config: RunConfig, source: str | Path, device: torch.device, stored: torch.dtype | None) -> Streamed | None:
    """The model streamed: where that is asked for, or memory is short and nothing stands against it.

    Raises:
        ConfigError: asked for, but something of the configuration needs the whole model.
        CheckpointError: asked for, but the folder can't be read layer by layer.
    """
    asked = config.memory.stream is True
    local = Path(source).is_dir()
    reason = "a hub name; expected model.path to be a local folder" if not local else obstacle(config)
    if config.memory.stream is False or (reason and not asked):
        return None
    if reason:
        raise ConfigError(f"memory.stream: can't go with {reason}")
    if not asked and not _short(Path(source), device):
        return None
    try:
        found = Streamed(source, device, stored, config.model.trust_remote_code)
    except CheckpointError as error:
        if asked:
            raise
        say(f"memory is short, but layers can't be read one by one: {error}")
        return None
    if not asked:
        say("memory is short: layers come from disk one by one (memory.stream=false loads the model whole)")
    return found


def _short(folder: Path, device: torch.device) -> bool:
    """Whether any process's memory is; half precision becomes float32 on a CPU."""
    shards = Shards.of_folder(folder)
    wide = 2 if device.type == "cpu" and shards.dtype.itemsize == 2 else 1
    short = shards.num_bytes * wide > _SHARE * free_bytes(device)
    return add_up(torch.tensor([float(short)], device=device)).item() > 0


class Streamed:
    """A model on meta, its shards, and the folder its pruned layers go to.

    Args:
        source: the model's folder.
        device: where layers are worked on.
        stored: the type of the result; the checkpoint's by default. Half precision is computed in float32 on a CPU.
        trust_remote_code: as for `from_pretrained`.
    """

    def __init__(
        self, source: str | Path, device: torch.device, stored: torch.dtype | None, trust_remote_code: bool
    ) -> None:
        return_freed()
        self.stored = stored or Shards.of_folder(Path(source)).dtype
        half = self.stored in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if device.type == "cpu" and half else self.stored
        self.device = device
        self.model, self.shards = open_streamed(source, self.dtype, trust_remote_code)
        self.weights = Weights(self.model, self.shards, device)
        self.writer: LayerWriter | None = None

    def write_to(self, folder: Path, resume: bool) -> None:
        """Where the result goes; layers an unfinished run has left there are kept with `resume`."""
        if rank():
            return  # the first process writes
        self.writer = LayerWriter(folder, self.stored, resume=True)
        if not resume:
            self.writer.abandon()
            self.writer = LayerWriter(folder, self.stored)

    def evaluated(self) -> AbstractContextManager[Weights]:
        """The model can run inside the `with` block: the dense one before pruning, the pruned one after."""
        written = self.writer is not None and bool(self.writer.parts)
        return offloaded(self.model, self.writer.shards if written and self.writer else self.shards, self.device)

    def layers(self, graph: CouplingGraph, removed: Mapping[str, list[int]]) -> StreamedLayers:
        """The layers, which lose the units of `removed` as soon as they are finished."""
        return StreamedLayers(self, graph, removed)

    def complete(self, path: str) -> None:
        """Write what no group was cut in: the layers left, and everything outside them."""
        for i in range(len(self.model.get_submodule(path))):  # type: ignore[arg-type]
            if self.writer and not self.writer.has(f"{path}.{i}"):
                with self.weights.enter(f"{path}.{i}"):
                    self.writer.write(f"{path}.{i}", self.weights.state(f"{path}.{i}"))
        if self.writer:
            self.writer.copy(self.shards, self.weights.outside_names(path))


class StreamedLayers:
    """`compensation.stream.Layers` from shards: read, cut when finished, checked, written, let go of."""

    def __init__(self, streamed: Streamed, graph: CouplingGraph, removed: Mapping[str, list[int]]) -> None:
        self.streamed, self.graph, self.removed = streamed, graph, removed
        self.path = layers_path(graph)

    def outside(self) -> AbstractContextManager[Any]:
        """Embeddings, the last norm, the head."""
        return self.streamed.weights.outside(self.path)

    def enter(self, layer: int) -> None:
        """Read a layer."""
        self.streamed.weights.load(f"{self.path}.{layer}")

    def leave(self, layer: int, run: Callable[[], Tensor]) -> None:
        """Cut a layer; its output must stay what it was; write it."""
        key = f"{self.path}.{layer}"
        units = {name: gone for name, gone in self.removed.items() if self.graph[name].layer == layer and gone}
        if units:
            self._cut(units, run)
        writer = self.streamed.writer
        if writer and not writer.has(key):
            writer.write(key, self.streamed.weights.state(key))
        self.streamed.weights.release(key)

    def _cut(self, units: Mapping[str, list[int]], run: Callable[[], Tensor]) -> None:
        expected = run()
        exact = all(self.graph[name].exact for name in units)  # elsewhere a norm runs over what is left
        problem = ""
        for by_value in (None, "*"):
            undo = cut_layer(self.streamed.model, self.graph, units, by_value)
            try:
                got = run()
                if not exact and got.shape == expected.shape:
                    return
                error = ((expected - got).float().abs().max() / expected.float().abs().max().clamp_min(1e-30)).item()
                if error <= TOLERANCE[expected.dtype]:
                    return
                problem = f"the cut layer's output differs from the masked one's by {error:.2g} of its size"
            except Exception as reason:
                problem = f"the cut layer doesn't run: {reason}"
            undo()
        raise SurgeryError(f"{', '.join(units)}: {problem}")


def layers_path(graph: CouplingGraph) -> str:
    """The module path of the list that the groups' layers are in.

    Raises:
        ConfigError: there is none, or more than one.
    """
    paths = set()
    for group in (group for group in graph.groups if group.layer is not None):
        parts = group.module.split(".")
        paths.add(".".join(parts[: parts.index(str(group.layer))]))
    if len(paths) != 1:
        raise ConfigError(f"memory.stream: expected one list of decoder layers, found {', '.join(paths) or 'none'}")
    return paths.pop()
