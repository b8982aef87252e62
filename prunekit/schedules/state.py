"""The state of a layer-wise run on disk: a run that was killed goes on, bit for bit the same.

One safetensors file per finished group holds the units removed and the repaired weights of its
consumers; `state.json` holds the facts that the result depends on. Every file is written beside its
place and renamed, so that it is either whole or not there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.calibration.consumers import Consumer
from prunekit.errors import CheckpointError, first_line
from prunekit.runtime.processes import rank

_HINT = "remove the folder, or choose another output_dir, to start anew"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is known of a finished group.

    Attributes:
        removed: the units removed from it.
        float64: how many of its Hessians took float64 to invert.
    """

    removed: list[int]
    float64: int = 0


class State:
    """The groups that a run has finished.

    Args:
        folder: the place of the files; made when the first group is finished.
        facts: everything that the result depends on, as a flat dict of JSON values.
        resume: whether to go on with the state of an unfinished run.

    Attributes:
        there: whether the folder held the state of an unfinished run.
        finished: the names of the groups that this run had finished.

    Raises:
        CheckpointError: the folder holds other files; or a state, and `resume` is not asked for; or
            a state with other facts; or a damaged one.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], resume: bool = False) -> None:
        # Through JSON, so that tuples compare equal to the lists that are read back.
        self.folder, self.facts = folder, json.loads(json.dumps(facts))
        self.there = there = (folder / "state.json").exists()
        if not there and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"{folder}: expected a new folder or the state of an unfinished run"
            )
        if there and not resume:
            raise CheckpointError(
                f"{folder}: holds an unfinished run: resume=true goes on with it; {_HINT}"
            )
        if there:
            self._refuse_other_facts()
        self.finished = {path.stem for path in folder.glob("*.safetensors")} if there else set()

    def _refuse_other_facts(self) -> None:
        before = self._read(self.folder / "state.json")
        for key in sorted({*before, *self.facts}):
            if before.get(key) != self.facts.get(key):
                made, now = before.get(key), self.facts.get(key)
                raise CheckpointError(
                    f"resume: {self.folder} was made with {key}={made}, this run has {now}; {_HINT}"
                )

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {error}; {_HINT}") from error

    def remove(self) -> None:
        """Remove the folder of a run that is finished."""
        if not rank():
            shutil.rmtree(self.folder, ignore_errors=True)

    def drop_if_empty(self) -> None:
        """Remove the folder of a run that was broken off before it had finished anything dear.

        That is a group, a part of a policy's search, or of the training of gates.
        """
        patterns = ("*.safetensors", "search-*", "gates-*")
        kept = [path for pattern in patterns for path in self.folder.glob(pattern)]
        if not rank() and not kept:
            shutil.rmtree(self.folder, ignore_errors=True)

    def remember(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Compute a small JSON object once: the unit counts, or the units chosen beforehand."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return self._read(path)
        value = compute()
        self._write(path, lambda target: write_json(target, value))
        return value

    def record(self, group: str, finished: Finished, consumers: Sequence[Consumer]) -> None:
        """Write what is known of a finished group, and the weights of its consumers."""
        tensors = {
            "removed": torch.tensor(finished.removed, dtype=torch.long),
            "float64": torch.tensor(finished.float64),
        }
        for consumer in drop_repeats(consumers):
            name = consumer.member.parameter
            tensors[f"{name}.weight"] = consumer.parameter.detach().cpu().contiguous()
            if consumer.bias is not None:
                tensors[f"{name}.bias"] = consumer.bias.detach().cpu()
        self.save_tensors(group, tensors)

    def restore(self, group: str, consumers: Sequence[Consumer]) -> Finished:
        """Give the consumers of a finished group their weights; what is known of the group.

        Raises:
            CheckpointError: the file of the group is damaged.
        """
        tensors = self.load_tensors(group)
        try:
            for consumer in drop_repeats(consumers):
                name = consumer.member.parameter
                consumer.parameter.data.copy_(tensors[f"{name}.weight"])
                if (bias := tensors.get(f"{name}.bias")) is not None:
                    consumer.set_bias(bias)
            return Finished(removed=tensors["removed"].tolist(), float64=int(tensors["float64"]))
        except (KeyError, RuntimeError) as error:
            path = self._path_of(group)
            raise CheckpointError(f"{path}: damaged: {first_line(error)}; {_HINT}") from error

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, which may begin with that of a folder and a slash."""
        from safetensors.torch import save_file

        self._write(self._path_of(name), lambda path: save_file(dict(tensors), path))

    def has_tensors(self, name: str) -> bool:
        """Whether tensors are kept under a name."""
        return self._path_of(name).exists()

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors that are kept under a name, on the CPU.

        Raises:
            CheckpointError: their file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path_of(name)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged: {first_line(error)}; {_HINT}") from error

    def drop_tensors(self, folder: str) -> None:
        """Let go of all tensors whose names begin with the name of this folder."""
        if not rank():
            shutil.rmtree(self.folder / folder, ignore_errors=True)

    def _path_of(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Let `write` write a temporary file, and rename it; only the first process does so.

        The facts are written before the first other file: without them a state is refused.
        """
        if rank():
            return
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = self.folder / "state.json"
            if not facts.exists() and path != facts:
                self._write(facts, lambda target: write_json(target, self.facts))
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except Exception as error:  # safetensors wraps the errors of the system in its own
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"{path}: can't be written: {first_line(error)}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value), encoding="utf-8")


def drop_repeats(consumers: Sequence[Consumer]) -> list[Consumer]:
    """One consumer for each stored weight: experts that are stacked share theirs."""
    return list({consumer.member.parameter: consumer for consumer in consumers}.values())
