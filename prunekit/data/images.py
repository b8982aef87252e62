"""Calibration samples with images: records of images and text, through the model's processor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.data.batches import Batch, count_positions, has_rows
from prunekit.data.chats import turns_of
from prunekit.data.corpora import RECORDS, read_records
from prunekit.errors import DataError, first_line

_PLACEHOLDER = "<image>"  # where an image belongs in a chat's text, as LLaVA's data have it
_FIELDS = ("image", "images")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSamples:
    """Samples with images, each as the arguments of a forward call.

    Attributes:
        batches: arguments of forward calls of several samples each, padded on the right; of one
            sample each where they can't be told apart in what the processor makes of several.
        available: how many records there were to draw from.
    """

    batches: list[Batch]
    available: int

    @cached_property
    def _kept_ids(self) -> Tensor:
        kept = [b["input_ids"][b["attention_mask"].bool()] for b in self.batches]
        return torch.cat(kept)

    @property
    def documents(self) -> int:
        """How many samples there are, one of a record each."""
        return sum(count_positions(batch)[0] for batch in self.batches)

    @property
    def distinct_tokens(self) -> int:
        """How many different tokens occur."""
        return len(self._kept_ids.unique())

    @property
    def origin(self) -> str:
        """Where the samples come from, in words."""
        count = f"{self.documents:,} record{'s' if self.documents != 1 else ''}"
        return f"{len(self._kept_ids):,} tokens of {count} with images"

    @property
    def warning(self) -> str | None:
        """What is wrong with the samples, in a sentence; None where nothing is."""
        if self.documents <= self.available:
            return None
        return (
            f"data.calibration: {self.documents - self.available} of the {self.documents} samples "
            f"repeat others: the file has {self.available} records; give more, or fewer samples"
        )


def read_image_records(name: str) -> list[dict[str, Any]]:
    """The records of a local file that holds images; nothing of any other corpus."""
    path = Path(name)
    if path.suffix not in RECORDS or not path.is_file():
        return []
    records = read_records(path)
    return records if any(_images_of(record) for record in records) else []


def draw_image_samples(
    path: str,
    records: Sequence[Mapping[str, Any]],
    processor: Any,
    marks: Collection[int],
    *,
    samples: int,
    length: int,
    rows: int,
    seed: int,
) -> ImageSamples:
    """Draw records in random order, and make batches of them with a processor.

    Args:
        path: the file of the records, for messages; paths of images are relative to its folder.
        records: with `image` or `images` (a path; or bytes, as the hub's parquet files have them),
            and `text` or a chat (`messages`, `conversations`, …).
        processor: the model's processor of transformers.
        marks: the ids of tokens that stand for images.
        samples: how many samples; records are repeated where there are fewer.
        length: how many tokens a sample has at most; longer texts are cut behind their images.
        rows: how many samples a batch has.
        seed: of the random order.

    Raises:
        DataError: a record without text or images, an image that can't be read, images that take
            more than `length` tokens, what the processor refuses.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(records), generator=generator).tolist()
    chosen = [order[i % len(order)] for i in range(samples)]
    batches: list[Batch] = []
    for start in range(0, samples, rows):
        numbers = chosen[start : start + rows]
        where = f"{path}: records {', '.join(str(number + 1) for number in sorted(set(numbers)))}"
        read = [_Sample.read(path, n, records[n]) for n in numbers]
        made = [_process(read, processor, where)]
        if not has_rows(made[0], len(read)):
            made = [_process([sample], processor, where) for sample in read]
        batches += [_shorten(batch, length, marks, where) for batch in made]
    return ImageSamples(batches=batches, available=len(records))


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A record with its images read: RGB images of PIL, and the record's fields."""

    images: list[Any]
    record: Mapping[str, Any]
    where: str

    @classmethod
    def read(cls, path: str, number: int, record: Mapping[str, Any]) -> _Sample:
        where = f"{path}: record {number + 1}"
        given = _images_of(record)
        if not given:
            raise DataError(f"{where}: expected image or images, as other records have, found none")
        images = [_read_image(image, Path(path).parent, where) for image in given]
        return cls(images=images, record=record, where=where)

    def text(self, processor: Any) -> str:
        """The text with a mark for each image, as the processor wants it."""
        mark = str(getattr(processor, "image_token", _PLACEHOLDER))
        turns = _chat_of(self.record)
        if turns is None:
            text = self.record.get("text")
            if not isinstance(text, str):
                found = ", ".join(map(str, self.record))
                raise DataError(f"{self.where}: expected text or messages, found {found}")
            if processor.chat_template is None:
                return text if mark in text else mark * len(self.images) + text
            turns = [{"role": "user", "content": _parts_of(text.replace(mark, _PLACEHOLDER))}]
        if not any(part["type"] == "image" for turn in turns for part in turn["content"]):
            asked = next((turn for turn in turns if turn["role"] == "user"), turns[0])
            asked["content"][:0] = [{"type": "image"} for _ in self.images]
        if processor.chat_template is None:
            return "\n".join(_plain(turn["content"], mark) for turn in turns)
        try:
            return str(processor.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # whatever a template raises
            reason = first_line(error)
            raise DataError(f"{self.where}: the chat template refuses it: {reason}") from error


def _images_of(record: Mapping[str, Any]) -> list[Any]:
    """What a record says of its images: paths, bytes, or a mapping with either."""
    for field in _FIELDS:
        if (given := record.get(field)) is not None:
            return list(given) if isinstance(given, list | tuple) else [given]
    return [
        part.get("image") or part.get("path") or part.get("url")
        for part in _parts_in(record.get("messages"))
        if part.get("type") == "image"
    ]


def _parts_in(messages: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of all messages whose content is a list of them."""
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from (part for part in content or [] if isinstance(part, Mapping))


def _read_image(given: Any, folder: Path, where: str) -> Any:
    """An image of PIL in RGB, from a path or from bytes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{where}: images need Pillow: pip install pillow") from error
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    if not isinstance(given, str | bytes) or not given:
        raise DataError(f"{where}: expected the path of an image or its bytes, got {given!r}")
    shown = given if isinstance(given, str) else f"its {len(given):,} bytes"
    if isinstance(given, str) and not (folder / given).is_file():
        raise DataError(f"{where}: no such image: {folder / given}")
    try:
        with Image.open(folder / given if isinstance(given, str) else BytesIO(given)) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise DataError(f"{where}: can't read an image from {shown}: {reason}") from error


def _chat_of(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The turns of a chat, their content in parts of text and images; None where it is none."""
    messages = record.get("messages")
    if isinstance(messages, list) and any(True for _ in _parts_in(messages)):
        if not all(isinstance(m, Mapping) and "role" in m for m in messages):
            return None
        turns = [{"role": m["role"], "content": m.get("content")} for m in messages]
    else:
        turns = [dict(turn) for turn in turns_of(record) or []]
    return [turn | {"content": _parts_of(turn["content"])} for turn in turns] or None


def _parts_of(content: Any) -> list[dict[str, Any]]:
    """Parts without the images themselves, of a text with placeholders or of a list of parts."""
    parts: list[dict[str, Any]] = []
    if not isinstance(content, str):
        for part in [content] if isinstance(content, Mapping) else content or []:
            own = part if isinstance(part, Mapping) else {"text": str(part)}
            is_image = own.get("type") == "image"
            text = own.get("text") or ""
            parts.append({"type": "image"} if is_image else {"type": "text", "text": text})
        return parts
    for i, text in enumerate(content.split(_PLACEHOLDER)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _plain(parts: Sequence[Mapping[str, Any]], mark: str) -> str:
    """The text of a turn without a template."""
    return "".join(mark if part["type"] == "image" else str(part["text"]) for part in parts)


def _process(samples: Sequence[_Sample], processor: Any, where: str) -> dict[str, Any]:
    """The arguments of a forward call, by the processor; rows are padded on the right."""
    tokenizer = processor.tokenizer
    before = tokenizer.pad_token, tokenizer.padding_side
    texts = [sample.text(processor) for sample in samples]
    try:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        made = processor(
            text=texts, images=[s.images for s in samples], padding=True, return_tensors="pt"
        )
    except Exception as error:  # whatever a processor raises, of images without a mark say
        raise DataError(f"{where}: the processor refuses them: {first_line(error)}") from error
    finally:
        tokenizer.pad_token, tokenizer.padding_side = before
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _shorten(
    batch: Mapping[str, Any], length: int, marks: Collection[int], where: str
) -> dict[str, Any]:
    """A batch of at most `length` tokens a row."""
    ids = batch["input_ids"]
    stand_in = torch.isin(ids, torch.tensor(sorted(marks)))
    needed = int(stand_in.nonzero()[:, 1].max()) + 1 if stand_in.any() else 0
    if needed > length:
        raise DataError(
            f"data.calibration.sequence_length: expected at least {needed}, which the images of "
            f"{where} take, got {length}"
        )
    whole = ids.shape
    return {
        name: value[:, :length] if value.shape == whole else value for name, value in batch.items()
    }


def place(batches: Sequence[Batch], device: torch.device, dtype: torch.dtype) -> list[Batch]:
    """Batches on a device, images in the type that the model computes in."""
    return [
        {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in batch.items()}
        for batch in batches
    ]
