"""Rows of lm-eval's tasks from local files instead of the hub:
`<folder>/<task>/<split>.parquet|.jsonl|.json`.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import DataError
from prunekit.runtime.console import say

_SUFFIXES = (".parquet", ".jsonl", ".json")
_SPELT = "|".join(_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The rows of each split that a task names, and the file of those it is evaluated on."""

    rows: Mapping[str, Any]
    file: Path
    columns: tuple[str, ...]


class LocalFiles:
    """A folder of task folders, in the columns of the hub's data sets.

    The parts of one data set (MMLU's subjects) may share a folder of its name; a column `subject`
    tells them apart. Rows are held in memory and never cached on disk, so a changed file gives its
    new rows.

    Raises:
        DataError: no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"eval.tasks_dir: no such folder: {root}")
        self.root = root
        self._read: dict[Path, Any] = {}

    def splits(self, config: Mapping[str, Any], shots: int) -> Splits | None:
        """The rows for a task's configuration; None where the task has no folder or its subject no
        rows.

        A split that is only named for few-shot examples may be missing where `shots` is 0.

        Raises:
            DataError: no rows to evaluate on, none for the few-shot examples, a file that can't be
                read.
        """
        folder, subject = self._locate(config)
        if folder is None:
            return None
        files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES}
        held_out, source = _evaluated(config, files, folder)
        rows = self._rows(files[source], subject)
        if not len(rows):
            return None
        if source != held_out:
            say_once(
                f"{config['task']}: {folder} has no split {held_out!r}, evaluating on {source!r}"
            )
        if shots:
            _check_fewshot(config, files, held_out, source, folder)
        given = {
            split: self._rows(files[split], subject) for split in _named(config) & files.keys()
        }
        every = dict.fromkeys(_named(config), rows) | given | {held_out: rows}
        return Splits(rows=every, file=files[source], columns=tuple(rows.column_names))

    def _locate(self, config: Mapping[str, Any]) -> tuple[Path | None, str | None]:
        name, part = config["task"], config.get("dataset_name")
        shared = self.root / name.removesuffix(f"_{part}")
        if (self.root / name).is_dir():
            return self.root / name, None
        return (shared, part) if part and shared.is_dir() else (None, None)

    def _rows(self, path: Path, subject: str | None) -> Any:
        if path not in self._read:
            self._read[path] = read_rows(path)
        rows = self._read[path]
        if subject is None:
            return rows
        if "subject" not in rows.column_names:
            raise DataError(f"{path}: missing column subject; found {', '.join(rows.column_names)}")
        return rows.select([at for at, value in enumerate(rows["subject"]) if value == subject])


def _named(config: Mapping[str, Any]) -> set[str]:
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    return {
        split for split in (*(config.get(key) for key in keys), _fewshot_split(config)) if split
    }


def _evaluated(
    config: Mapping[str, Any], files: Mapping[str, Path], folder: Path
) -> tuple[str, str]:
    """The split that lm-eval evaluates on, and the one that is there for it."""
    named = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
    for source in (*named, "test", "validation"):
        if source in files:
            return named[0], source
    raise DataError(f"{folder}: expected {named[0]}{_SPELT}, found {listed(folder)}")


def _fewshot_split(config: Mapping[str, Any]) -> str | None:
    """Where few-shot examples come from, by lm-eval's rule; None where the configuration spells
    them out.
    """
    own = config.get("fewshot_config") or {}
    named = own.get("split") or config.get("fewshot_split")
    if named or "samples" in own:
        return named
    return (
        config.get("training_split") or config.get("validation_split") or config.get("test_split")
    )


def _check_fewshot(
    config: Mapping[str, Any], files: Mapping[str, Path], held_out: str, source: str, folder: Path
) -> None:
    """Examples must not come from the very rows that stand in for the split to evaluate on."""
    pool = _fewshot_split(config)
    if pool and pool not in files:
        raise DataError(
            f"{folder}: few-shot examples of {config['task']} need {pool}{_SPELT}, found {listed(folder)}"
        )
    if pool == source != held_out:
        raise DataError(
            f"{folder}: {config['task']} takes few-shot examples from {pool!r}, so it needs {held_out}{_SPELT} too"
        )


def read_rows(path: Path) -> Any:
    """A parquet or JSON-lines file, or a JSON list of records, as a `datasets.Dataset` in memory.

    Raises:
        DataError: it can't be read, or holds no rows.
    """
    import pyarrow.parquet
    from datasets import Dataset

    try:
        rows = (
            Dataset(pyarrow.parquet.read_table(path))
            if path.suffix == ".parquet"
            else Dataset.from_list(_records(path))
        )
    except Exception as error:  # pyarrow and datasets have many
        raise DataError(f"{path}: can't be read: {first_line(error)}") from error
    if not len(rows):
        raise DataError(f"{path}: it holds no rows")
    return rows


def _records(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def unreadable(config: Mapping[str, Any], splits: Splits, error: Exception) -> DataError:
    """What keeps a task from reading its rows: columns that its prompt or code names, or else the
    error itself.
    """
    fields = (
        ("process_docs",)
        if config.get("process_docs")
        else ("doc_to_text", "doc_to_target", "doc_to_choice")
    )
    named = set().union(*(_columns_in(config.get(field)) for field in fields))
    missing = sorted(named - set(splits.columns))
    problem = (
        f"missing {', '.join(missing)}"
        if missing
        else f"{type(error).__name__}: {first_line(error)}"
    )
    return DataError(
        f"{splits.file}: task {config['task']}: {problem}; found columns {', '.join(splits.columns)}"
    )


def _columns_in(field: Any) -> set[str]:
    """The columns in a field of a task: a column, a function `path/module.name` that reads `doc`, a
    template.
    """
    if not isinstance(field, str):
        return set()
    module, _, name = field.rpartition(".")
    if Path(module).is_absolute() and Path(f"{module}.py").is_file():
        tree = ast.parse(Path(f"{module}.py").read_text(encoding="utf-8"))
        bodies = [
            node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        return {column for body in bodies for node in ast.walk(body) for column in _subscript(node)}
    from jinja2 import Environment, meta

    return (
        {field}
        if field.isidentifier()
        else meta.find_undeclared_variables(Environment().parse(field))
    )


def _subscript(node: ast.AST) -> list[str]:
    match node:
        case ast.Subscript(
            value=ast.Name(id="doc"), slice=ast.Constant(value=str(column)), ctx=ast.Load()
        ):
            return [column]
    return []


@functools.cache
def say_once(message: str) -> None:
    """One line, the first time; the same tasks are checked before a run and run on several models."""
    say(message)


def listed(folder: Path) -> str:
    """What a folder holds, for a message."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"


def first_line(error: BaseException) -> str:
    """An error's first line, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
