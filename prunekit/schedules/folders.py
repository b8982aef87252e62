"""The folders of a run: for groups that are finished, and for activations beyond memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunekit.config import RunConfig, flat
from prunekit.data.batches import Batch
from prunekit.graph import CouplingGraph
from prunekit.runtime.processes import rank, together, world_size
from prunekit.schedules.state import State

STATE = ".state"  # what an unfinished run leaves in its output folder
# The sections of the configuration that the choice of units, or their repair, depends on.
_DEPENDS_ON = (
    "ratio",
    "target",
    "target_shape",
    "groups",
    "shapes",
    "seed",
    "dtype",
    "importance",
    "policy",
    "scope",
    "cost",
    "compensation",
    "schedule",
    "data",
)


@dataclass(frozen=True, kw_only=True)
class Folders:
    """The folders of a run.

    Attributes:
        state: where finished groups are kept, so that a run that was broken off can go on;
            None: nowhere.
        activations: the folder of activations that memory has no room for; None: the system's
            folder for temporary files.
        model: where the layers of a streamed model are written.
        identity: tells the dense model from others, for the state.
        undo: put the model back as it was after a failure.
        keep: the state is still needed when the model has been cut.
        saves: the model is saved once it is pruned.
    """

    state: Path | None = None
    activations: Path | None = None
    model: Path = Path("model")
    identity: str = ""
    undo: bool = True
    keep: bool = False
    saves: bool = False

    def open_state(
        self, config: RunConfig, graph: CouplingGraph, batches: Sequence[Batch]
    ) -> State | None:
        """Open the state of the run, with everything that its result depends on.

        Raises:
            CheckpointError: a state of another run, or `resume` is not asked for.
        """
        if self.state is None:
            return None
        facts = {
            "model": self.identity,
            "graph": graph.fingerprint,
            "calibration": _digest(batches),
            "processes": world_size(),
            "torch": torch.__version__,
        }
        sections = {key: value for key, value in asdict(config).items() if key in _DEPENDS_ON}
        with together():  # all processes look before one of them writes
            return State(self.state, facts | flat(sections), config.resume)


NOWHERE = Folders()


def activations_folder(config: RunConfig, output: Path | None) -> Path | None:
    """The folder of this process for activations that memory has no room for.

    It lies in `memory.folder`, or else in the state in the `output` folder. None where there is
    neither: the system's folder for temporary files serves then.
    """
    if config.memory.folder is not None:
        parent = Path(config.memory.folder)
    elif output is not None:
        parent = output / STATE
    else:
        return None
    # The name depends on the run and the rank alone, so that a process finds its files again when
    # the run goes on.
    path = "" if output is None else str(output.absolute())
    run = hashlib.sha256(path.encode()).hexdigest()[:8] if path else str(os.getpid())
    return parent / f"activations-{run}-{rank()}"


def _digest(batches: Sequence[Batch]) -> str:
    """16 hexadecimal digits that tell calibration batches from others."""
    hashed = hashlib.sha256()
    for tensor in (t for batch in batches for t in batch.values() if isinstance(t, Tensor)):
        numbers = tensor.detach().cpu().contiguous().flatten()
        hashed.update(numbers.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
