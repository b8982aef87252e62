"""`task=export`, and what `export` asks of any run's result: a format, code, an upload."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from prunekit.checkpoint import (
    from_pretrained,
    load_processor,
    load_tokenizer,
    open_streamed,
    save_pretrained,
)
from prunekit.config import BUILT, RunConfig, build_as, import_modules
from prunekit.errors import ConfigError, DataError, ExportError, PrunekitError
from prunekit.exports import Export
from prunekit.exports.parallel import check_tensor_parallel
from prunekit.jobs.folder import clear_halves, ensure_empty
from prunekit.jobs.sources import Source, load_as_configured, loading_of, source_of
from prunekit.report import Report, model_card
from prunekit.runtime.console import say
from prunekit.runtime.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The `export` section: what is written beside a model, and where it is uploaded to.

    Attributes:
        writer: writes another program's format; None: no other format.
        remote_code: write transformers a file that it builds the model with.
        push_to_hub: the name of the repository that the model is uploaded to.
        private: whether that repository is private, where it is new.
        tensor_parallel: how many devices will share each layer of the model.
    """

    writer: Export | None = None
    remote_code: bool = False
    push_to_hub: str | None = None
    private: bool = True
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that can't be meant."""
        for key in ("remote_code", "private"):
            if not isinstance(value := getattr(self, key), bool):
                raise ConfigError(f"export.{key}: expected true or false, got {value!r}")
        if type(self.tensor_parallel) is not int or self.tensor_parallel < 1:
            raise ConfigError(
                f"export.tensor_parallel: expected a whole number ≥ 1, got {self.tensor_parallel!r}"
            )
        name = self.push_to_hub
        named = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        if name is not None and not named:
            raise ConfigError(
                f"export.push_to_hub: expected a repository's name, user/name, got {name!r}"
            )

    @classmethod
    def build(cls, section: Mapping[str, Any], writer: Export | None = None) -> ExportSettings:
        """Build what a section says; a `writer` that is given takes the place of its own.

        Raises:
            ConfigError: a value that can't be meant.
            ExportError: an option that the format doesn't have.
        """
        common = {key: value for key, value in section.items() if key in BUILT["export"]}
        common = {key: value for key, value in common.items() if value is not None}
        own = {key: value for key, value in section.items() if key not in BUILT["export"]}
        if writer is not None and not isinstance(writer, Export):
            raise ConfigError(
                "export: expected a name, or an object of a subclass of "
                f"prunekit.exports.Export, got {writer!r}"
            )
        return cls(writer=writer or build_as(Export, own, "export"), **common)

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.writer or self.remote_code or self.push_to_hub)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ExportError where no cut of a model can be exported as it is asked for."""
        if self.tensor_parallel > 1:
            check_tensor_parallel(model, self.tensor_parallel, dense=True)
        if self.writer is not None:
            self.writer.check_model(model)

    def finish(self, folder: Path) -> None:
        """Write the other format from a finished run's folder, and push the model.

        An error leaves the run as it is.
        """
        try:
            if self.tensor_parallel > 1:
                check_tensor_parallel(open_streamed(folder / "model")[0], self.tensor_parallel)
            if self.writer is not None:
                model = from_pretrained(folder / "model")
                self.writer.write(model, load_tokenizer(folder / "model", False), folder)
            if self.push_to_hub:
                push(folder / "model", self.push_to_hub, self.private)
        except PrunekitError as error:
            raise type(error)(
                f"{error}; the model itself is finished: {folder / 'model'}"
            ) from error


def run_export(
    config: RunConfig,
    output: Path,
    *,
    settings: ExportSettings | None = None,
    source: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Path]:
    """`task=export`: write a model in another format or with code beside it, or upload it.

    Args:
        config: names the model by `model.path`, and what is written by `export`.
        output: a new or empty folder.
        settings: in place of the section `export`.
        source: the model, in place of the one that `model.path` names.
        tokenizer: the tokenizer, in place of the one beside the model.

    Returns:
        The files and folders that were written.
    """
    import_modules(config.imports)
    clear_halves(output)
    ensure_empty(output)
    settings = settings or ExportSettings.build(config.export)
    if not settings.wanted:
        raise ConfigError(
            "task=export: expected export=gguf, export=onnx, export.remote_code=true or "
            "export.push_to_hub=NAME, got none of them"
        )
    source = source_of(config) if source is None else source
    written: list[Path] = []
    folder = None if isinstance(source, PreTrainedModel) else Path(source)
    saves = settings.remote_code or folder is None and settings.push_to_hub is not None
    if settings.writer is not None or saves:
        model, tokenizer = _open(config, source, tokenizer)
        check_tensor_parallel(model, settings.tensor_parallel)
        if settings.writer is not None:
            written.append(settings.writer.write(model, tokenizer, output))
        if saves:
            written.append(output / "model")
            beside = _load_own_processor(config, folder) or tokenizer
            save_pretrained(model, written[-1], beside, remote_code=settings.remote_code)
            _write_card(written[-1], folder)
            folder = written[-1]
        if settings.remote_code:
            say(f"{folder}: loads with trust_remote_code=True")
    if settings.push_to_hub and folder is not None:
        push(folder, settings.push_to_hub, settings.private)
    return written


def _open(
    config: RunConfig, source: Source, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with its tokenizer; one in memory is taken as it is."""
    if isinstance(source, PreTrainedModel):
        if tokenizer is None:
            raise ConfigError("tokenizer: expected the tokenizer of the model in memory, got none")
        return source, tokenizer
    trust = config.model.trust_remote_code
    model = load_as_configured(source, config.model)
    return model, tokenizer or load_tokenizer(source, trust)


def _load_own_processor(config: RunConfig, folder: Path | None) -> Any:
    """The processor in a model's folder; None where there is none."""
    if folder is None or not folder.is_dir():
        return None
    return load_processor(folder, config.model.trust_remote_code)


def _write_card(folder: Path, source: Path | None) -> None:
    """Write the card of the run that the model came from, or copy the card that it had.

    A model that came from memory (`source` None) has neither.
    """
    if source is None:
        return
    try:
        text = (source.parent / "report.json").read_text(encoding="utf-8")
        report = Report.from_json(text)
        write_text(folder / "README.md", model_card(report, *loading_of(folder)))
    except (OSError, ValueError, DataError):
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
