"""Corpora: named ones (the embedded text, hub data sets) and local files, as lists of documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit.data import embedded
from prunekit.errors import DataError, first_line, suggest

_TEXT = {".txt", ".raw", ".tokens", ".md", ".text"}
_RECORDS = {".jsonl", ".json", ".parquet"}


def load_corpus(name: str, purpose: str, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The documents of a corpus, by a name from the configuration's `corpora` or by a path.

    Args:
        name: "embedded", another key of `known`, or a text (.txt, .raw, .tokens, .md), JSON (.json,
            .jsonl) or parquet file.
        purpose: "calibration" or "eval": picks the split.
        known: name → how to load it: `hub`, `config`, `splits`, `data_files`, `field`.

    Raises:
        DataError: an unknown name, a file that can't be read or lacks the field, no text in it.
    """
    records = load_records(name, purpose, known)
    source = known.get(name, {})
    documents = [
        text_of(record, source.get("field", "text"), source.get("hub", name)) for record in records
    ]
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DataError(f"{purpose} corpus {name}: it holds no text")
    return documents


def load_records(
    name: str, purpose: str, known: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The records of a corpus, with all their fields; a document without fields is `{"text": …}`.

    Args:
        name: as for `load_corpus`.
        purpose: "calibration", "recovery" (the calibration split where it has none of its own) or
            "eval".
        known: as for `load_corpus`.

    Raises:
        DataError: an unknown name, a file that can't be read.
    """
    if name == "embedded":
        split: embedded.Split = "heldout" if purpose == "eval" else "train"
        return [{"text": text} for _, text in embedded.documents(split)]
    if name in known:
        return _from_hub(name, purpose, known[name])
    if Path(name).exists():
        return read_records(Path(name))
    if "/" in name or Path(name).suffix in _TEXT | _RECORDS:
        raise DataError(f"{purpose} corpus: no such file: {name}")
    raise DataError(
        f"{purpose} corpus: unknown name {name!r}: {suggest(name, ['embedded', *known])}, or a path"
    )


def stamp_of(name: str, known: Mapping[str, Mapping[str, Any]]) -> str:
    """A text that changes with a corpus: how it is loaded, or the size and the time of a file."""
    path = Path(name)
    if name == "embedded" or name in known or not path.exists():
        return f"{name} {known.get(name)}"
    found = path.stat()
    return f"{path.resolve()} {found.st_ino} {found.st_size} {found.st_mtime_ns}"


def read_file(path: Path, field: str = "text") -> list[str]:
    """The documents of a local file: a text file is one document, a record's is its `field`."""
    return [text_of(record, field, path) for record in read_records(path)]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a local file; a text file is one record, `{"text": …}`."""
    if path.is_dir() or path.suffix not in _TEXT | _RECORDS:
        raise DataError(f"{path}: expected a file ending in {', '.join(sorted(_TEXT | _RECORDS))}")
    try:
        if path.suffix in _TEXT:
            return [{"text": path.read_text(encoding="utf-8")}]
        if path.suffix == ".parquet":
            import pyarrow.parquet

            records = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            records = _json_lines(path)
        else:
            records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path}: can't be read: {error}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: expected a list of records")
    return records


def _json_lines(path: Path) -> list[Any]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise DataError(f"{path}: line {number} can't be read: {error}") from error
    return records


def text_of(record: Mapping[str, Any], field: str, where: object) -> str:
    """A record's text: its `field`, or instruction, input and output one after the other."""
    if isinstance(record.get(field), str):
        return record[field]
    if {"instruction", "output"} <= record.keys():
        parts = (record["instruction"], record.get("input", ""), record["output"])
        return "\n".join(part for part in parts if part)
    raise DataError(
        f"{where}: expected a text field {field!r}, found {', '.join(map(str, record))}"
    )


def _check_source(name: str, source: object) -> None:
    """Raise DataError where an entry of `corpora` does not say what to load."""
    if not isinstance(source, Mapping):
        raise DataError(
            f"corpora.{name}: expected a mapping with hub and splits, got {source!r}; a file is "
            "given by its path in the place of the name"
        )
    for key, kind, what in (("hub", str, "a name on the hub"), ("splits", Mapping, "a mapping")):
        if not isinstance(source.get(key), kind):
            raise DataError(f"corpora.{name}.{key}: expected {what}, got {source.get(key)!r}")


def _from_hub(name: str, purpose: str, source: Mapping[str, Any]) -> list[dict[str, Any]]:
    from datasets import load_dataset

    _check_source(name, source)
    splits = source["splits"]
    try:
        rows = load_dataset(
            source["hub"],
            source.get("config"),
            data_files=source.get("data_files"),
            split=splits.get(purpose, splits["calibration"])
            if purpose == "recovery"
            else splits[purpose],
        )
    except Exception as error:
        message = first_line(error)
        raise DataError(
            f"{purpose} corpus {name}: can't load {source['hub']} from the hub: {message}"
        ) from error
    return list(rows)
