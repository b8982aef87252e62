"""`task=export`, and what `export` asks of any run's result: another format, code beside the
weights, the hub.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.checkpoint import from_pretrained, load_tokenizer, save_pretrained
from prunekit.config import RunConfig, build
from prunekit.errors import ConfigError, ExportError, PrunekitError
from prunekit.jobs.folder import clear_halves, ensure_empty
from prunekit.jobs.job import loading_of, source_of
from prunekit.report import model_card
from prunekit.runtime.console import say
from prunekit.runtime.files import write_text

_COMMON = ("remote_code", "push_to_hub", "private")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The `export` section: `writer` has `write(model, tokenizer, folder)`, which gives the file's
    path, and `check_model(model)`, which raises where it knows that such models can't be written.
    """

    writer: Any
    remote_code: bool
    push_to_hub: str | None
    private: bool

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Export:
        """Checked; ConfigError or ExportError for what can't be."""
        given = {key: section.get(key) for key in _COMMON}
        for key in ("remote_code", "private"):
            if not isinstance(given[key] or False, bool):
                raise ConfigError(f"export.{key}: expected true or false, got {given[key]!r}")
        name = given["push_to_hub"]
        if name is not None and not (
            isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        ):
            raise ConfigError(
                f"export.push_to_hub: expected a repository's name, user/name, got {name!r}"
            )
        writer = build(
            {key: value for key, value in section.items() if key not in _COMMON}, "export"
        )
        return cls(
            writer=writer,
            remote_code=bool(given["remote_code"]),
            push_to_hub=name,
            private=given["private"] is not False,
        )

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.writer or self.remote_code or self.push_to_hub)

    def check(self, model: Any) -> None:
        """Raise ExportError where the format can't express such models, whatever their sizes."""
        if self.writer is not None:
            self.writer.check_model(model)

    def finish(self, folder: Path) -> None:
        """Of a finished run's folder, write the other format and push the model; an error leaves
        the run as it is.
        """
        try:
            if self.writer is not None:
                self.writer.write(
                    from_pretrained(folder / "model"),
                    load_tokenizer(folder / "model", False),
                    folder,
                )
            if self.push_to_hub:
                push(folder / "model", self.push_to_hub, self.private)
        except PrunekitError as error:
            raise type(error)(
                f"{error}; the model itself is finished: {folder / 'model'}"
            ) from error


def run_export(config: RunConfig, output: Path) -> None:
    """`task=export`: any model's folder in another format, or with code beside it, or on the hub."""
    clear_halves(output)
    ensure_empty(output)
    export, source = Export.of(config.export), source_of(config)
    if not export.wanted:
        raise ConfigError(
            "task=export: expected export=gguf, export=onnx, export.remote_code=true or "
            "export.push_to_hub=NAME, got none of them"
        )
    trust, folder = config.model.trust_remote_code, Path(source)
    if export.writer is not None or export.remote_code:
        model, tokenizer = (
            from_pretrained(source, trust_remote_code=trust),
            load_tokenizer(source, trust),
        )
        if export.writer is not None:
            export.writer.write(model, tokenizer, output)
        if export.remote_code:
            folder = output / "model"
            save_pretrained(model, folder, tokenizer, remote_code=True)
            _write_card(folder, Path(source))
            say(f"{folder}: loads with trust_remote_code=True")
    if export.push_to_hub:
        push(folder, export.push_to_hub, export.private)


def _write_card(folder: Path, source: Path) -> None:
    """The card of the run the model came from, for the folder it is in now; else the card it had."""
    try:
        report = json.loads((source.parent / "report.json").read_text(encoding="utf-8"))
        write_text(folder / "README.md", model_card(report, loading_of(folder)))
    except (OSError, ValueError, KeyError):
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", folder / "README.md")


def push(folder: Path, name: str, private: bool) -> None:
    """Upload a model's folder; ExportError where the hub says no."""
    from huggingface_hub import HfApi

    if not (folder / "config.json").exists():
        raise ExportError(f"export.push_to_hub: expected a model's folder, {folder} is none")
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        url = api.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="Pruned with prunekit"
        )
    except Exception as error:  # of the network, of the hub, of a name it doesn't take
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"export.push_to_hub: {name}: {reason[0]}") from error
    say(f"pushed to {url}")
