"""Corpora: named ones (the embedded text, hub data sets) and local files, as lists of documents."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.data import embedded
from prunekit.data.chats import render, turns_of
from prunekit.errors import DataError, first_line, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = {".txt", ".raw", ".tokens", ".md", ".text"}
RECORDS = {".jsonl", ".json", ".parquet"}
# A shuffled row of the hub is drawn from among so many, some 20 MB of C4, or from so many
# characters, where rows are as long as books.
_BUFFER, _BUFFERED = 10_000, 50_000_000
_BATCH, _PAGE = 200, 1 << 20  # rows and bytes of a parquet file that are read at a time
WHOLE = 100_000_000  # bytes of a local file that is held in memory; of a larger one rows are read
# Bytes of a text file that is one document; a longer one is documents of so many characters.
_DOCUMENT, _PART = 16_000_000, 1_000_000


def open_corpus(
    name: str,
    purpose: str,
    known: Mapping[str, Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | None = None,
) -> Iterable[str]:
    """The documents of a corpus, by a name from the configuration's `corpora` or by a path.

    Args:
        name: "embedded", another key of `known`, or a text (.txt, .raw, .tokens, .md), JSON (.json,
            .jsonl) or parquet file.
        purpose: "calibration" or "eval": picks the split.
        known: name → how to load it: `hub`, `revision`, `config`, `splits`, `data_files`, `field`.
        tokenizer: chats and instructions are rendered with its chat template, if it has one.
        seed: rows of the hub come in an order that it decides; None: in theirs.

    Returns:
        A list; of the hub and of a file beyond `WHOLE` an iterator, which reads no more than is
        taken. No document is empty.

    Raises:
        DataError: an unknown name, a file that can't be read or lacks the field, no text in it.
    """
    source = known.get(name, {})
    if name in known and name != "embedded":
        _check_source(name, source)
    field, where = source.get("field", "text"), source.get("hub", name)
    records = open_records(name, purpose, known, seed)
    texts = (text_of(record, field, where, tokenizer) for record in records)
    documents = _not_empty(texts, f"{purpose} corpus {name}")
    return list(documents) if isinstance(records, list) else documents


def load_corpus(
    name: str,
    purpose: str,
    known: Mapping[str, Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    characters: int | None = None,
) -> list[str]:
    """The documents of a corpus as a list; see `open_corpus`.

    Args:
        name: as for `open_corpus`.
        purpose: as for `open_corpus`.
        known: as for `open_corpus`.
        tokenizer: as for `open_corpus`.
        characters: documents from the beginning that hold so many suffice; None: all.
    """
    documents: list[str] = []
    count = 0
    for text in open_corpus(name, purpose, known, tokenizer):
        documents.append(text)
        count += len(text)
        if characters is not None and count >= characters:
            break
    return documents


def _not_empty(texts: Iterable[str], what: str) -> Iterator[str]:
    """The texts that are not blank; DataError where there is none."""
    empty = True
    for text in texts:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise DataError(f"{what}: it holds no text")


def open_records(
    name: str, purpose: str, known: Mapping[str, Mapping[str, Any]], seed: int | None = None
) -> Iterable[dict[str, Any]]:
    """The records of a corpus, with all their fields; a document without fields is `{"text": …}`.

    Args:
        name: as for `open_corpus`.
        purpose: "calibration", "recovery" (the calibration split where it has none of its own) or
            "eval".
        known: as for `open_corpus`.
        seed: as for `open_corpus`; of a file beyond `WHOLE`, too.

    Returns:
        A list; of the hub and of a file beyond `WHOLE` an iterator.

    Raises:
        DataError: an unknown name, a file that can't be read.
    """
    path = Path(name)
    if name == "embedded":
        split: embedded.Split = "heldout" if purpose == "eval" else "train"
        return [{"text": text} for _, text in embedded.documents(split)]
    if name in known:
        return _stream_from_hub(name, purpose, known[name], seed)
    if path.is_file() and path.stat().st_size > WHOLE:
        rows = stream_records(path)
        return rows if seed is None else _shuffle(rows, seed)
    if path.exists():
        return read_records(path)
    if "/" in name or path.suffix in _TEXT | RECORDS:
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


def share_text(calibration: str, evaluation: str, known: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a corpus that calibrates and one that is evaluated are one file, or one split.

    Raises:
        DataError: an entry of `known` that does not say what to load.
    """
    if calibration == "embedded" or evaluation == "embedded":
        return False  # its two parts share no text
    one, other = known.get(calibration), known.get(evaluation)
    if one is None or other is None:
        return one is other and Path(calibration).resolve() == Path(evaluation).resolve()
    _check_source(calibration, one)
    _check_source(evaluation, other)
    same = all(one.get(key) == other.get(key) for key in ("hub", "config", "revision"))
    return same and one["splits"].get("calibration") == other["splits"].get("eval")


def read_file(path: Path, field: str = "text") -> list[str]:
    """The documents of a local file: a text file is one document, a record's is its `field`."""
    return [text_of(record, field, path) for record in read_records(path)]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a local file as a list; see `stream_records`."""
    return list(stream_records(path))


def stream_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a local file; those of JSON lines and parquet are read as they are taken.

    A text file is one record, `{"text": …}`; one beyond `_DOCUMENT` bytes is many, which end with a
    line.

    Raises:
        DataError: a file that is no text, JSON or parquet, that can't be read or holds no records,
            or JSON beyond `WHOLE` bytes.
    """
    if path.is_dir() or path.suffix not in _TEXT | RECORDS:
        raise DataError(f"{path}: expected a file ending in {', '.join(sorted(_TEXT | RECORDS))}")
    readers = {".parquet": _parquet_rows, ".jsonl": _json_lines, ".json": _json_list}
    try:
        for record in readers.get(path.suffix, _texts)(path):
            if not isinstance(record, dict):
                raise DataError(f"{path}: expected a list of records")
            yield record
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path}: can't be read: {error}") from error


def _texts(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        if path.stat().st_size <= _DOCUMENT:
            yield {"text": file.read()}
            return
        while part := file.read(_PART):
            yield {"text": part + file.readline(_PART)}


def _parquet_rows(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:
        for rows in ParquetFile(file, buffer_size=_PAGE).iter_batches(_BATCH, use_threads=False):
            yield from rows.to_pylist()


def _json_list(path: Path) -> Any:
    if (size := path.stat().st_size) > WHOLE:
        raise DataError(
            f"{path}: .json is read as a whole, expected at most {WHOLE / 1e6:,.0f} MB, got "
            f"{size / 1e6:,.0f} MB; JSON lines (.jsonl) and parquet are read row by row"
        )
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of records")
    return found


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    message = f"{path}: line {number} can't be read: {error}"
                    raise DataError(message) from error


def text_of(
    record: Mapping[str, Any],
    field: str,
    where: object,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """A record's text: its `field`, or its chat by the tokenizer's template (`chats.render`).

    Without a template the turns of a chat follow one another, a line each.
    """
    if isinstance(record.get(field), str):
        return str(record[field])
    if (turns := turns_of(record)) is not None:
        return render(turns, tokenizer)
    own = f", its type {type(record[field]).__name__}" if field in record else ""
    raise DataError(
        f"{where}: expected a text field {field!r}, found {', '.join(map(str, record))}{own}"
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


def _stream_from_hub(
    name: str, purpose: str, source: Mapping[str, Any], seed: int | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a data set on the hub, read as they are taken; with a seed, shuffled.

    A shuffled row comes from among the next ones, and files come in a random order.
    """
    from datasets import load_dataset_builder

    _check_source(name, source)
    splits = source["splits"]
    split = splits.get(purpose, splits["calibration"]) if purpose == "recovery" else splits[purpose]
    try:
        builder = load_dataset_builder(
            source["hub"],
            source.get("config"),
            data_files=source.get("data_files"),
            revision=source.get("revision"),
        )
        _read_by_page(builder)
        rows = builder.as_streaming_dataset(split=split)
        if seed is None:
            yield from rows
        else:  # with a buffer of one row only the files are shuffled
            yield from _shuffle(rows.shuffle(seed=seed, buffer_size=1), seed)
    except Exception as error:
        message = first_line(error)
        raise DataError(
            f"{purpose} corpus {name}: can't load {source['hub']} from the hub: {message}"
        ) from error


def _shuffle(rows: Iterable[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """The rows, each drawn from among the next `_BUFFER` ones or `_BUFFERED` characters."""
    generator = random.Random(seed)
    held: list[tuple[int, dict[str, Any]]] = []
    characters = 0
    for row in rows:
        held.append((len(str(row)), row))
        characters += held[-1][0]
        while len(held) >= _BUFFER or characters >= _BUFFERED:
            place = generator.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            size, drawn = held.pop()
            characters -= size
            yield drawn
    generator.shuffle(held)
    yield from (row for _, row in held)


def _read_by_page(builder: Any) -> None:
    """Let parquet files be read some rows at a time; `datasets` reads a group of rows at once.

    Such a group may be 100,000 rows, of some hundred MB of text. `datasets` asks pyarrow's scanner,
    which decodes a group as a whole, whatever the size of its batches; a `ParquetFile` does not.
    """
    from datasets.packaged_modules.parquet.parquet import Parquet

    if not isinstance(builder, Parquet):
        return
    builder._generate_tables = partial(_pages, builder)
    builder.SLEEP_ON_THREADS_SHUTDOWNS = False  # no thread of the scanner is left to wait for


def _pages(builder: Any, files: Sequence[str], **_: Any) -> Iterator[tuple[Any, Any]]:
    """The rows of parquet files as pyarrow's tables of `_BATCH` ones, each with its number."""
    import fsspec
    import pyarrow
    from pyarrow.parquet import ParquetFile

    for number, name in enumerate(files):
        with fsspec.open(name, "rb") as file:
            pages = ParquetFile(file, buffer_size=_PAGE).iter_batches(_BATCH, use_threads=False)
            for part, rows in enumerate(pages):
                yield f"{number}_{part}", builder._cast_table(pyarrow.Table.from_batches([rows]))
