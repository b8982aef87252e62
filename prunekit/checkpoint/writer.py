"""Write a model folder layer by layer, in a hidden folder that an interrupted run goes on with."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.checkpoint.describe import describe
from prunekit.checkpoint.files import locating_errors, read_config
from prunekit.checkpoint.manifest import write_manifest
from prunekit.checkpoint.shards import Shards
from prunekit.checkpoint.weights import persistent_buffers
from prunekit.errors import CheckpointError
from prunekit.model.compat import unvalidated
from prunekit.model.ties import parameter_places
from prunekit.model.verify import check_loadable, required_record
from prunekit.runtime.files import check_free, disk_errors, publish, write_text
from prunekit.runtime.memory import to_host

_KEY = "prunekit_key"  # the entry of a shard's metadata that names the part it holds


class LayerWriter:
    """Writes the folder of a model that never is in memory as a whole, one shard for each part.

    Until `finish` the shards lie in a hidden folder beside it, which stays there when a run is
    interrupted; each of them is whole or isn't there.

    Args:
        folder: a new or empty folder.
        dtype: the type that floating tensors are stored in; None: as they come.
        resume: go on with the parts that an interrupted run left; a damaged file counts as a part
            that was not written.

    Raises:
        CheckpointError: the folder is in use or can't be written, or an interrupted run's parts are
            there already.
    """

    def __init__(
        self, folder: str | Path, dtype: torch.dtype | None = None, resume: bool = False
    ) -> None:
        self.target, self.dtype = Path(folder), dtype
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        check_free(self.target)
        if self.folder.exists() and not resume:
            raise CheckpointError(
                f"{self.folder}: an interrupted run left its layers there: resume it or remove them"
            )
        with disk_errors(self.target):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, Shards] = {}
        for file in sorted(path for path in self.folder.iterdir() if path.is_file()):
            self._take_up(file)

    def _take_up(self, file: Path) -> None:
        try:
            part = Shards.of_file(file)
            self.parts[part.metadata[_KEY]] = part
        except (CheckpointError, KeyError):
            file.unlink()

    def has(self, key: str) -> bool:
        """Whether a part is written."""
        return key in self.parts

    @property
    def shards(self) -> Shards:
        """All parts written so far; the model can run with them before the folder is finished."""
        return Shards(
            self.folder, {name: part[name] for part in self.parts.values() for name in part}
        )

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a part's tensors in one shard.

        Args:
            key: a name for the part, for example the path of a module.
            tensors: the model's name → tensor; of a tied tensor one name only.

        Raises:
            CheckpointError: the disk is full or can't be written; nothing of the part is left then.
        """
        from safetensors import torch as safetensors

        temporary, file = self.folder / f".{key}.tmp", self.folder / f"{key}.safetensors"
        own = self.gather(tensors)
        with disk_errors(self.target):
            try:
                safetensors.save_file(own, str(temporary), metadata={"format": "pt", _KEY: key})
                with temporary.open("rb+") as written:
                    os.fsync(written.fileno())
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
        self.parts[key] = Shards.of_file(file)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in host memory, in the types that they are stored in.

        `write` takes them as they are, so that another thread need not touch the device.
        """
        return {
            name: to_host(tensor.detach(), self._dtype_of(tensor))
            for name, tensor in tensors.items()
        }

    def copy(self, shards: Shards, names: Mapping[str, str]) -> None:
        """Store tensors of other shards as they are, each as a part of its own.

        Args:
            shards: the other shards.
            names: the model's name → the name there.
        """
        for name, stored in names.items():
            if not self.has(name):
                self.write(name, {name: shards.read([stored])[stored]})

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype

    def finish(self, model: Any, tokenizer: Any = None, remote_code: bool = False) -> None:
        """Write config, index, tokenizer and manifest, and rename the folder to `target`.

        Args:
            model: the cut model, of the shapes that were written; its weights may be on meta.
            tokenizer: the tokenizer of the model, saved beside it.
            remote_code: as `save_pretrained` has it.

        Raises:
            CheckpointError: a tensor of the model was not written or has another shape, the model
                is none that a folder can describe, or the disk is full; the parts stay for a
                resumed run.
        """
        self._check_complete(model)
        with locating_errors(self.target):
            record = required_record(model)
        with disk_errors(self.target):
            files = self._number()
            index = {"metadata": {"total_size": self.shards.num_bytes}, "weight_map": files}
            write_text(
                self.folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n"
            )
            self._describe(model)
            describe(self.folder, model, record, remote_code)
            with locating_errors(self.target):
                check_loadable(model, read_config(self.folder))
            if tokenizer is not None:
                tokenizer.save_pretrained(self.folder)
            write_manifest(self.folder)
            publish(self.folder, self.target)

    def abandon(self) -> None:
        """Remove all parts written so far."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_complete(self, model: Any) -> None:
        written = dict(self.shards.entries)
        wanted = {name: model.get_parameter(name) for name in parameter_places(model)}
        for name, tensor in {**wanted, **persistent_buffers(model)}.items():
            if name not in written:
                raise CheckpointError(f"{self.target}: can't be finished: {name} was not written")
            if written[name].shape != tensor.shape:
                shape = tuple(tensor.shape)
                raise CheckpointError(
                    f"{self.target}: {name}: expected shape {shape}, written {written[name].shape}"
                )
            del written[name]
        if written:
            raise CheckpointError(
                f"{self.target}: can't be finished: no place for {', '.join(sorted(written)[:3])}"
            )

    def _number(self) -> dict[str, str]:
        """Give the shards their final names; tensor → file."""
        places = {}
        for number, key in enumerate(sorted(self.parts, key=_natural_key), 1):
            name = f"model-{number:05}-of-{len(self.parts):05}.safetensors"
            file = self.parts[key].where
            if file.name != name:
                file.replace(self.folder / name)
                self.parts[key] = Shards.of_file(self.folder / name)
            places.update(dict.fromkeys(self.parts[key], name))
        return places

    def _describe(self, model: Any) -> None:
        """`config.json` and `generation_config.json`, with the type that is stored."""
        before = model.config.dtype
        model.config.dtype = self.dtype or before
        model.config.architectures = [type(model).__name__]
        try:
            with unvalidated(model.config):
                model.config.save_pretrained(self.folder)
        finally:
            model.config.dtype = before
        if model.can_generate():
            model.generation_config.save_pretrained(self.folder)


def _natural_key(key: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
