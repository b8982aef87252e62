"""What a layer-wise run has finished, on disk: a run that was killed goes on from there, bit for
bit the same.

One safetensors file per group, with the units removed and the consumers' repaired weights;
`state.json` says what the run was asked for. Every file is written beside its place and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prunekit.calibration.consumers import Consumer
from prunekit.errors import CheckpointError
from prunekit.runtime.processes import rank

_HINT = "remove the folder, or choose another output_dir, to start anew"


class State:
    """The groups that are finished.

    Args:
        folder: where they are kept; made when the first one is.
        facts: what the run depends on, flat; a state made with others is refused.
        resume: whether to go on with what is there.

    Raises:
        CheckpointError: the folder holds other things, or a state and `resume` is not asked for, or
            one with other facts; damage.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], resume: bool = False) -> None:
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
            self._compare()
        self.finished = {path.stem for path in folder.glob("*.safetensors")} if there else set()

    def _compare(self) -> None:
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
        """The run is finished: nothing of it is needed any more."""
        if not rank():
            shutil.rmtree(self.folder, ignore_errors=True)

    def drop_if_empty(self) -> None:
        """Remove the folder where no group was finished."""
        if not rank() and not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def remember(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A small JSON object that is computed once: the counts, or the units chosen at the
        beginning.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            return self._read(path)
        found = compute()
        self._write(path, lambda target: target.write_text(json.dumps(found), encoding="utf-8"))
        return found

    def record(self, group: str, units: Sequence[int], consumers: Sequence[Consumer]) -> None:
        """Write a finished group down."""
        from safetensors.torch import save_file

        tensors = {"removed": torch.tensor(units, dtype=torch.long)}
        for consumer in _stored_once(consumers):
            name = consumer.member.parameter
            tensors[f"{name}.weight"] = consumer.parameter.detach().cpu().contiguous()
            if consumer.bias is not None:
                tensors[f"{name}.bias"] = consumer.bias.detach().cpu()
        self._write(self.folder / f"{group}.safetensors", lambda path: save_file(tensors, path))

    def restore(self, group: str, consumers: Sequence[Consumer]) -> list[int]:
        """Give the consumers of a finished group their weights; the units removed."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / f"{group}.safetensors"
        try:
            tensors = load_file(path)
            for consumer in _stored_once(consumers):
                name = consumer.member.parameter
                consumer.parameter.data.copy_(tensors[f"{name}.weight"])
                if (bias := tensors.get(f"{name}.bias")) is not None:
                    consumer.set_bias(bias)
            return [int(unit) for unit in tensors["removed"]]
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: damaged: {str(error).splitlines()[0]}; {_HINT}"
            ) from error

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Atomically; only the first of several processes does."""
        if rank():
            return
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            facts = self.folder / "state.json"
            if not facts.exists() and path != facts:
                self._write(
                    facts,
                    lambda target: target.write_text(json.dumps(self.facts), encoding="utf-8"),
                )
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except Exception as error:  # safetensors wraps the system's
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path}: can't be written: {str(error).splitlines()[0]}"
            ) from error


def _stored_once(consumers: Sequence[Consumer]) -> list[Consumer]:
    """One consumer for each stored weight: experts share theirs."""
    return list({consumer.member.parameter: consumer for consumer in consumers}.values())
