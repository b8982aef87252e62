"""Processes that a launcher starts: those of one job of submitit work on one run together."""

from __future__ import annotations

import sys
from typing import Any


def join_processes(hydra: Any) -> None:
    """Give this process the place that torchrun would give it, where submitit started several.

    Args:
        hydra: Hydra's own part of the configuration of the run.
    """
    if "submitit" not in hydra.launcher._target_ or "submitit" not in sys.modules:
        return
    import submitit
    from submitit.helpers import TorchDistributedEnvironment

    if submitit.JobEnvironment().num_tasks > 1:
        # `device=auto` takes the GPU of the process's number, so that all stay visible.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
