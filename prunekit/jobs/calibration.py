"""The calibration windows of a job: from one corpus, or mixed from several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.config import RunConfig
from prunekit.data.corpora import open_corpus, share_text, stamp_of
from prunekit.data.images import ImageSamples, draw_image_samples, read_image_records
from prunekit.data.windows import Windows, draw_windows, mix_windows
from prunekit.errors import ConfigError, DataError
from prunekit.jobs.job import Subject
from prunekit.model.inputs import check_length
from prunekit.model.parts import image_tokens
from prunekit.report.parts import Calibration
from prunekit.runtime.console import say
from prunekit.runtime.processes import world_size

Drawn = Windows | ImageSamples  # what a method is calibrated on


def rows_of_batch(config: RunConfig) -> int:
    """How many samples make a batch.

    Each process has a part of the samples: a batch must not hold more than its part.
    """
    text = config.data.calibration
    return min(text.batch_size, -(-text.samples // world_size()))


def load_windows(config: RunConfig, subject: Subject) -> Drawn:
    """Draw the calibration windows, or samples with images, and say where they come from.

    Raises:
        ConfigError: sequences longer than the model was made for.
        DataError: a corpus that can't be read, or is too short.
    """
    text = config.data.calibration
    check_length("data.calibration.sequence_length", text.sequence_length, subject.model)
    samples = text.samples_by_corpus()
    if config.default_data is not None:
        say(
            f"calibration: {text.samples} × {text.sequence_length} tokens of {text.corpus}, by the "
            f"preset of the method or the model; data=… takes others"
        )

    def load() -> Drawn:
        if records := _records_with_images(config):
            return _draw_images(records, config, subject)
        parts = [_draw(name, count, config, subject) for name, count in samples.items()]
        return mix_windows(parts, text.seed)

    if subject.kept is None:
        windows = load()
    else:
        stamps = tuple((stamp_of(name, config.corpora), n) for name, n in samples.items())
        how = ("calibration", stamps, text.sequence_length, text.seed)
        windows = subject.kept.windows(how, load)
    for warning in warnings_of(config, windows):
        say(f"warning: {warning}")
    return windows


def warnings_of(config: RunConfig, windows: Drawn) -> list[str]:
    """What is wrong with the calibration samples, and with what is evaluated beside them."""
    warnings = [windows.warning] if windows.warning else []
    for name in config.data.calibration.samples_by_corpus():
        if any(share_text(name, measured, config.corpora) for measured in config.eval.corpora):
            shown = Path(name).name
            warnings.append(
                f"eval.corpora: {shown} calibrates too: its perplexity is of text that was seen; "
                "give a text of its own"
            )
    return warnings


def _records_with_images(config: RunConfig) -> list[dict[str, Any]]:
    """The records of the calibration file, if it holds images; ConfigError for one in a mix."""
    text = config.data.calibration
    for name in text.mix or {}:
        if name not in config.corpora and read_image_records(name):
            raise ConfigError(
                f"data.calibration.mix: {name} holds images; expected data.calibration.path={name}"
            )
    return read_image_records(text.path) if text.path else []


def _draw_images(
    records: Sequence[Mapping[str, Any]], config: RunConfig, subject: Subject
) -> ImageSamples:
    """Samples with images, by the processor of the model."""
    text = config.data.calibration
    assert text.path
    if subject.processor is None:
        raise DataError(
            f"{text.path}: its records hold images; expected a model that sees, with its processor "
            f"in its folder, got a {type(subject.model).__name__} without"
        )
    return draw_image_samples(
        text.path,
        records,
        subject.processor,
        image_tokens(subject.model),
        samples=text.samples,
        length=text.sequence_length,
        rows=rows_of_batch(config),
        seed=text.seed,
    )


def _draw(name: str, samples: int, config: RunConfig, subject: Subject) -> Windows:
    """Windows of one corpus; of the hub no more is read than they need."""
    text = config.data.calibration
    documents = open_corpus(name, "calibration", config.corpora, subject.tokenizer, text.seed)
    counted = documents if isinstance(documents, list) else _Counted(documents)
    windows = draw_windows(counted, subject.tokenizer, samples, text.sequence_length, text.seed)
    if isinstance(counted, _Counted):
        say(f"calibration corpus {name}: {counted.count:,} documents were read")
    return windows


class _Counted:
    """Documents, counted as they are read."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.documents, self.count = documents, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.documents:
            self.count += 1
            yield text


def describe_calibration(config: RunConfig, windows: Drawn) -> Calibration:
    """Describe the calibration text and its amount, for the report."""
    text = config.data.calibration
    samples = text.samples_by_corpus()
    names = [Path(name).name if "/" in name or text.path else name for name in samples]
    mixed = (f"{name} ({n})" for name, n in zip(names, samples.values(), strict=True))
    return Calibration(
        corpus=names[0] if len(names) == 1 else ", ".join(mixed),
        samples=text.samples,
        sequence_length=text.sequence_length,
        seed=text.seed,
        documents=windows.documents,
        distinct_tokens=windows.distinct_tokens,
    )
