"""Whether the model of a job is streamed from disk layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from prunekit.checkpoint import Shards
from prunekit.checkpoint.streamed import Streamed
from prunekit.config import RunConfig
from prunekit.errors import CheckpointError, ConfigError
from prunekit.runtime.console import say
from prunekit.runtime.devices import compute_dtype
from prunekit.runtime.memory import free_bytes
from prunekit.runtime.processes import add_up
from prunekit.schedules.method import Method

_SHARE = 0.6  # of the free memory that a whole model may take before it is streamed by itself


def obstacle(config: RunConfig, method: Method) -> str | None:
    """What of the configuration needs the whole model in memory; None: nothing."""
    if method.importance.by_layer is None:
        return "an importance that scores all layers at once; expected importance=obs"
    if not method.schedule.layerwise:
        return "schedule=oneshot; expected layerwise"
    if config.recovery.get("_target_"):
        return "a recovery; expected recovery=none, and task=recover on the result"
    if method.policy.measures:
        return "a policy that measures the model; expected one of shapes over the depth"
    if method.scope.ranking != "local" or method.scope.rounds != 1:
        return "groups that compete; expected scope.ranking=local and one round"
    if method.cost.measures:
        return f"cost={method.cost.name}, which measures the model"
    return None


def stream(
    config: RunConfig,
    method: Method,
    source: str | Path,
    device: torch.device,
    stored: torch.dtype | None,
) -> Streamed | None:
    """The model streamed: where that is asked for, or memory is short and nothing stands against
    it.

    Raises:
        ConfigError: asked for, but something of the configuration needs the whole model.
        CheckpointError: asked for, but the folder can't be read layer by layer.
    """
    asked = config.memory.stream is True
    local = Path(source).is_dir()
    reason = (
        "a hub name; expected model.path to be a local folder"
        if not local
        else obstacle(config, method)
    )
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
        say(
            "memory is short: layers come from disk one by one (memory.stream=false loads the model whole)"
        )
    return found


def _short(folder: Path, device: torch.device) -> bool:
    """Whether any process's memory is; half precision becomes float32 on a CPU."""
    shards = Shards.of_folder(folder)
    wider = compute_dtype(shards.dtype, device).itemsize // shards.dtype.itemsize
    short = shards.num_bytes * wider > _SHARE * free_bytes(device)
    return add_up(torch.tensor([float(short)], device=device)).item() > 0
