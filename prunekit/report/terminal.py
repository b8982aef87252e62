"""The summary that the terminal shows when a run is done."""

from __future__ import annotations

from pathlib import Path

from prunekit.report import words
from prunekit.report.document import Answers, document, title
from prunekit.report.record import Report
from prunekit.report.tables import large_tokens, summary

_FILES = (
    *("model", "plan.json", "shares.csv", "updates.safetensors"),
    *("report.json", "report.md", "report.html"),
)
_SAMPLES = 3
_LENGTH = 240  # characters of a sample


def print_summary(report: Report, folder: Path) -> None:
    """Print the summary, the warnings, the lines that load the model, some samples, the files.

    Args:
        report: the report of the run.
        folder: the folder that the run wrote.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = large_tokens(report) or summary(report)
    table = Table(title=Text(words.plain(title(report))))
    for i, name in enumerate(shown.header):
        table.add_column(Text(words.plain(name)), justify="right" if i else "left")
    for row in shown.rows:
        table.add_row(*(Text(words.plain(cell)) for cell in row))
    console = Console(highlight=False, soft_wrap=True, width=None if Console().is_terminal else 120)
    console.print(table)
    for line in _lines(report, folder):
        console.print(line, markup=False)


def _lines(report: Report, folder: Path) -> list[str]:
    lines = [f"warning: {words.shorten(warning, 400)}" for warning in report.warnings or ()]
    if (folder / "model").exists():
        lines.append(
            f"import prunekit\nmodel = prunekit.from_pretrained({str(folder / 'model')!r})"
        )
    samples = [
        block
        for section in document(report)
        for block in section.blocks
        if isinstance(block, Answers)
    ]
    for sample in samples[:_SAMPLES]:
        lines.append(
            f"\n> {words.shorten(sample.prompt, _LENGTH)}"
            + (f"  ({sample.mode})" if sample.mode else "")
        )
        lines += [
            f"{column}: {words.shorten(answer, _LENGTH)}"
            for column, answer in sample.answers.items()
        ]
    there = [f"{name}/" if name == "model" else name for name in _FILES if (folder / name).exists()]
    return [*lines, f"\n{folder}: {', '.join(there)}"] if there else lines
