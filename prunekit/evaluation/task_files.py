"""Rows of lm-eval's tasks from local files: `<folder>/<task>/<split>.parquet|.jsonl|.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.errors import DataError, first_line
from prunekit.evaluation.task_messages import list_folder, say_once

if TYPE_CHECKING:
    from datasets import Dataset

_SUFFIXES = (".parquet", ".jsonl", ".json")
_ANY_SUFFIX = "|".join(_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The rows that a task is given.

    Attributes:
        rows: split → its rows, for every split that the task's configuration names.
        file: the file with the rows that the task is evaluated on.
        columns: the columns of this file.
    """

    rows: Mapping[str, Dataset]
    file: Path
    columns: tuple[str, ...]


class LocalFiles:
    """A folder with a folder for each task, in which a file has the columns of the hub's data set.

    The parts of one data set (the subjects of MMLU) may share a folder of its name, where a column
    `subject` tells them apart. Rows are held in memory and never cached on disk, so that a changed
    file gives its new rows.

    Raises:
        DataError: no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"eval.tasks_dir: no such folder: {root}")
        self.root = root
        self._datasets: dict[Path, Dataset] = {}

    def splits(self, config: Mapping[str, Any], shots: int) -> Splits | None:
        """The rows for a task's configuration; None where the files hold no rows for the task.

        A split that is named for few-shot examples alone may be missing where `shots` is 0.

        Raises:
            DataError: no file to evaluate on, none for the few-shot examples, a file that can't be
                read.
        """
        folder, subject = self._locate(config)
        if folder is None:
            return None
        files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES}
        wanted, source = _choose_split(config, files, folder)
        rows = self._rows(files[source], subject)
        if not len(rows):
            return None
        if source != wanted:
            say_once(
                f"{config['task']}: {folder} has no split {wanted!r}, evaluating on {source!r}"
            )
        if shots:
            _check_fewshot(config, files, wanted, source, folder)
        # lm-eval looks up every named split, even a split that it takes no row from.
        named = dict.fromkeys(_named_splits(config), rows)
        own = {split: self._rows(files[split], subject) for split in named if split in files}
        return Splits(
            rows=named | own | {wanted: rows},
            file=files[source],
            columns=tuple(rows.column_names),
        )

    def _locate(self, config: Mapping[str, Any]) -> tuple[Path | None, str | None]:
        """The folder of a task, and the subject of the rows to take; None: all rows."""
        name, part = config["task"], config.get("dataset_name")
        if (self.root / name).is_dir():
            return self.root / name, None
        shared = self.root / name.removesuffix(f"_{part}")
        return (shared, part) if part and shared.is_dir() else (None, None)

    def _rows(self, path: Path, subject: str | None) -> Dataset:
        if path not in self._datasets:
            self._datasets[path] = read_rows(path)
        rows = self._datasets[path]
        if subject is None:
            return rows
        if "subject" not in rows.column_names:
            raise DataError(
                f"{path}: expected a column subject, found {', '.join(rows.column_names)}"
            )
        return rows.select([at for at, value in enumerate(rows["subject"]) if value == subject])


def _choose_split(
    config: Mapping[str, Any], files: Mapping[str, Path], folder: Path
) -> tuple[str, str]:
    """The split that lm-eval evaluates on, and the split with a file that takes its place."""
    named = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
    for source in (*named, "test", "validation"):
        if source in files:
            return named[0], source
    raise DataError(f"{folder}: expected {named[0]}{_ANY_SUFFIX}, found {list_folder(folder)}")


def _named_splits(config: Mapping[str, Any]) -> set[str]:
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    splits = [*(config.get(key) for key in keys), _fewshot_split(config)]
    return {split for split in splits if split}


def _fewshot_split(config: Mapping[str, Any]) -> str | None:
    """The split that few-shot examples come from, by lm-eval's rule.

    None where the configuration spells the examples out.
    """
    own = config.get("fewshot_config") or {}
    named = own.get("split") or config.get("fewshot_split")
    if named or "samples" in own:
        return named
    splits = (config.get(f"{kind}_split") for kind in ("training", "validation", "test"))
    return next((split for split in splits if split), None)


def _check_fewshot(
    config: Mapping[str, Any], files: Mapping[str, Path], wanted: str, source: str, folder: Path
) -> None:
    """Examples must not come from the very rows that stand in for the split to evaluate on."""
    task, pool = config["task"], _fewshot_split(config)
    if pool and pool not in files:
        raise DataError(
            f"{folder}: few-shot examples of {task} need {pool}{_ANY_SUFFIX}, "
            f"found {list_folder(folder)}"
        )
    if pool == source != wanted:
        raise DataError(
            f"{folder}: {task} takes few-shot examples from {pool!r}, so it needs "
            f"{wanted}{_ANY_SUFFIX} too"
        )


def read_rows(path: Path) -> Dataset:
    """The rows of a parquet file, of JSON lines or of a JSON list of records, held in memory.

    Raises:
        DataError: the file can't be read, or holds no rows.
    """
    import pyarrow.parquet
    from datasets import Dataset

    try:
        if path.suffix == ".parquet":
            rows = Dataset(pyarrow.parquet.read_table(path))
        else:
            rows = Dataset.from_list(_read_json(path))
    except Exception as error:  # pyarrow and datasets have many kinds
        raise DataError(f"{path}: can't be read: {first_line(error, named=True)}") from error
    if not len(rows):
        raise DataError(f"{path}: expected rows, found none")
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    # Not `splitlines`: a JSON string may hold other line breaks as they are, such as U+2028.
    return [json.loads(line) for line in text.split("\n") if line.strip()]
