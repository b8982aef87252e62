"""Schedules: oneshot and layerwise."""

from prunekit.schedules.schedules import Layerwise, OneShot, Schedule, Task
from prunekit.schedules.state import State

__all__ = ["Layerwise", "OneShot", "Schedule", "State", "Task"]
