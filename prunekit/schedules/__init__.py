"""Schedules: oneshot and layerwise."""

from prunekit.schedules.base import Assignment, Schedule
from prunekit.schedules.layerwise import Layerwise
from prunekit.schedules.oneshot import OneShot
from prunekit.schedules.state import State

__all__ = ["Layerwise", "OneShot", "Schedule", "State", "Assignment"]
