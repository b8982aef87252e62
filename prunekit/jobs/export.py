"""`task=export`, and what `export` asks of any run's result: another format, code beside the weights, the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.checkpoint import from_pretrained, load_tokenizer, save_pretrained
from prunekit.config import RunConfig, build
from prunekit.console import say
from prunekit.errors import ConfigError, ExportError
from prunekit.jobs.folder import ensure_empty
from prunekit.jobs.job import source_of

_COMMON = ("remote_code", "push_to_hub", "private")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The `export` section: `writer` has `write(model, tokenizer, folder)`, which gives the file's path."""

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
        writer = build({key: value for key, value in section.items() if key not in _COMMON}, "export")
        return cls(
            writer=writer,
            remote_code=bool(given["remote_code"]),
            push_to_hub=given["push_to_hub"] and str(given["push_to_hub"]),
            private=given["private"] is not False,
        )

    def finish(self, folder: Path) -> None:
        """Of a finished run's folder, write the other format and push the model; an error leaves the run as it is."""
        try:
            if self.writer is not None:
                self.writer.write(from_pretrained(folder / "model"), load_tokenizer(folder / "model", False), folder)
            if self.push_to_hub:
                push(folder / "model", self.push_to_hub, self.private)
        except ExportError as error:
            raise ExportError(f"{error}; the model itself is finished: {folder / 'model'}") from error


def run_export(config: RunConfig, output: Path) -> None:
    """`task=export`: any model's folder in another format, or with code beside it, or on the hub."""
    ensure_empty(output)
    export, source = Export.of(config.export), source_of(config)
    if export.writer is None and not export.remote_code and not export.push_to_hub:
        raise ConfigError("task=export: expected export=gguf, export=onnx, export.remote_code=true or "
                          "export.push_to_hub=NAME, got none of them")  # fmt: skip
    trust, folder = config.model.trust_remote_code, Path(source)
    if export.writer is not None or export.remote_code:
        model, tokenizer = from_pretrained(source, trust_remote_code=trust), load_tokenizer(source, trust)
        if export.writer is not None:
            export.writer.write(model, tokenizer, output)
        if export.remote_code:
            folder = output / "model"
            save_pretrained(model, folder, tokenizer, remote_code=True)
            say(f"{folder}: loads with trust_remote_code=True")
    if export.push_to_hub:
        push(folder, export.push_to_hub, export.private)


def push(folder: Path, name: str, private: bool) -> None:
    """Upload a model's folder; ExportError where the hub says no."""
    from huggingface_hub import HfApi

    if not (folder / "config.json").exists():
        raise ExportError(f"export.push_to_hub: expected a model's folder, {folder} is none")
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        url = api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Pruned with prunekit")
    except Exception as error:  # of the network, of the hub, of a name it doesn't take
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"export.push_to_hub: {name}: {reason[0]}") from error
    say(f"pushed to {url}")
