"""Schedules: when units are chosen, at once (oneshot) or layer by layer (layerwise)."""

from prunekit.schedules.base import Assignment, Schedule
from prunekit.schedules.layerwise import Layerwise
from prunekit.schedules.oneshot import OneShot
from prunekit.schedules.state import State

__all__ = ["Assignment", "Layerwise", "OneShot", "Schedule", "State"]
