"""Whether the model of a job is streamed from disk layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from prunekit.checkpoint import Shards
from prunekit.checkpoint.streamed import Streamed
from prunekit.config import VOCABULARY, RunConfig, kinds_of
from prunekit.errors import CheckpointError, ConfigError
from prunekit.jobs.job import Job
from prunekit.recovery import Recovery
from prunekit.runtime.console import say
from prunekit.runtime.devices import compute_dtype, pick_dtype
from prunekit.runtime.memory import free_bytes
from prunekit.runtime.processes import add_up
from prunekit.schedules.method import Method

_SHARE = 0.6  # of the free memory: a model that takes more is streamed


def open_streamed_source(job: Job, method: Method, recovery: Recovery | None) -> Streamed | None:
    """Open the model of a job layer by layer; None where it is not to be streamed.

    A model is streamed if `memory.stream` is true; or if it is auto, memory is short, and the job
    does not need the whole model.

    Raises:
        ConfigError: asked for, but something of the job needs the whole model, or the folder does
            not exist.
        CheckpointError: asked for, but the folder can't be read, or the layers run, one by one.
    """
    source, device, asked = job.source, job.stages.device, job.config.memory.stream is True
    if job.config.memory.stream is False:
        return None
    if not isinstance(source, str | Path) or not Path(source).is_dir():
        if asked:
            raise ConfigError(
                f"model.path: the folder {source} does not exist: memory.stream=true reads layers "
                "from a local one"
            )
        return None
    if reason := _find_obstacle(job.config, method, recovery):
        if asked:
            raise ConfigError(f"memory.stream: can't go with {reason}")
        return None
    if not asked and not _is_short(Path(source), device):
        return None
    trust, stored = job.config.model.trust_remote_code, pick_dtype(job.config.dtype)
    try:
        streamed = Streamed(source, device, stored, trust)
        streamed.check_layers()
    except CheckpointError as error:
        if asked:
            raise
        say(f"memory is short, but layers can't be read one by one: {error}")
        return None
    if not asked:
        say(
            "memory is short: layers come from disk one by one (memory.stream=false loads the "
            "model whole)"
        )
    return streamed


def _find_obstacle(config: RunConfig, method: Method, recovery: Recovery | None) -> str | None:
    """The part of a job that needs the whole model, and what to set instead; None: no part."""
    if VOCABULARY in kinds_of(config.groups):
        return "groups=vocabulary; expected it in a run of its own, before"
    if method.importance.by_layer is None:
        return "an importance that scores all layers at once; expected importance=obs"
    if not method.schedule.layerwise:
        return "schedule=oneshot; expected layerwise"
    if recovery is not None:
        return "a recovery; expected recovery=none, and task=recover on the result"
    if method.policy.measures and not method.policy.stands_in:
        return "a policy that measures the model; expected one of shapes over the depth"
    if method.scope.ranking != "local" or method.scope.rounds != 1:
        return "groups that compete; expected scope.ranking=local and one round"
    if method.cost.measures:
        return f"cost={method.cost.name}, which measures the model"
    return None


def _is_short(folder: Path, device: torch.device) -> bool:
    """Whether the memory of any process is too short for the model in the type it computes in."""
    shards = Shards.of_folder(folder)
    wider = compute_dtype(shards.dtype, device).itemsize // shards.dtype.itemsize
    short = shards.num_bytes * wider > _SHARE * free_bytes(device)
    return add_up(torch.tensor([float(short)], device=device)).item() > 0
