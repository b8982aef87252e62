"""Schedules: oneshot and layerwise."""

from prunekit.schedules.schedules import Layerwise, OneShot, Schedule, Task

__all__ = ["Layerwise", "OneShot", "Schedule", "Task"]
