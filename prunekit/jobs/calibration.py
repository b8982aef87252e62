"""The calibration windows of a job: from one corpus, or mixed from several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from prunekit.config import RunConfig
from prunekit.data.corpora import open_corpus, stamp_of
from prunekit.data.windows import Windows, draw_windows, mix_windows
from prunekit.jobs.job import Subject
from prunekit.model.inputs import check_length
from prunekit.report.parts import Calibration
from prunekit.runtime.console import say


def load_windows(config: RunConfig, subject: Subject) -> Windows:
    """Draw the calibration windows, and say where they come from.

    Raises:
        ConfigError: sequences longer than the model was made for.
        DataError: a corpus that can't be read, or is too short.
    """
    text = config.data.calibration
    check_length("data.calibration.sequence_length", text.sequence_length, subject.model)
    samples = text.samples_by_corpus()

    def load() -> Windows:
        parts = [_draw(name, count, config, subject) for name, count in samples.items()]
        return mix_windows(parts, text.seed)

    if subject.kept is None:
        windows = load()
    else:
        stamps = tuple((stamp_of(name, config.corpora), n) for name, n in samples.items())
        how = ("calibration", stamps, text.sequence_length, text.seed)
        windows = subject.kept.windows(how, load)
    if windows.warning:
        say(f"warning: {windows.warning}")
    return windows


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


def describe_calibration(config: RunConfig, windows: Windows) -> Calibration:
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
