"""`sweep.html`: the table of all runs, which sorts by a click, and the Pareto picture."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.report import words
from prunekit.report.page import environment, style_sheet
from prunekit.sweeps.index import Line, columns_of, swept_of
from prunekit.sweeps.naming import short_keys
from prunekit.sweeps.picture import draw_pareto
from prunekit.sweeps.record import DONE, FAILED

if TYPE_CHECKING:
    from jinja2 import Template

_FOLDER = Path(__file__).parent
_WHOLE = ("parameters", "macs")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the table.

    Attributes:
        text: what is shown.
        sort: what the table is sorted by: a number as text, or words; "" comes last.
        words: whether it holds words, which stand on the left.
        link: where it leads, from the page on.
    """

    text: str
    sort: str
    words: bool = False
    link: str = ""


def render_page(lines: Sequence[Line], title: str) -> str:
    """The text of sweep.html: one file, with a script that sorts its table and no other."""
    swept, figures = swept_of(lines), columns_of(lines)
    short = short_keys(swept)
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    heads = ["run", *short.values(), "status", *map(_head, figures), "seconds", "error"]
    rows = [_row(line, swept, figures) for line in lines]
    texts = [any(cell.words for cell in column) for column in zip(*rows, strict=True)]
    failed = sum(line.record.status == FAILED for line in lines)
    done = sum(line.record.status == DONE for line in lines)
    return _template().render(
        title=f"Sweep {title}",
        style=style_sheet() + (_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        summary=f"{len(lines)} runs: {done} done, {failed} failed.",
        picture=draw_pareto(lines),
        header=list(zip(heads, texts, strict=True)),
        rows=rows,
    )


@cache
def _template() -> Template:
    return environment(_FOLDER).get_template("page.html.j2")


def _head(figure: str) -> str:
    """The name of a figure with spaces, so that a narrow column may break it."""
    return figure.replace("_", " ").replace(".", ", ", 1)


def _row(line: Line, swept: Sequence[str], figures: Sequence[str]) -> list[Cell]:
    record = line.record
    page = f"{record.folder}/report.html" if line.figures else ""
    cells = [Cell(text=str(record.number), sort=str(record.number), link=page)]
    cells += [_value(record.values.get(key, "")) for key in swept]
    cells += [Cell(text=record.status, sort=record.status, words=True)]
    cells += [_figure(name, line.figures.get(name)) for name in figures]
    cells += [_figure("seconds", record.seconds)]
    return [*cells, Cell(text=record.error or "", sort=record.error or "", words=True)]


def _value(text: str) -> Cell:
    """A swept value: a number, or words."""
    try:
        float(text)
    except ValueError:
        return Cell(text=text, sort=text, words=True)
    return Cell(text=text, sort=text)


def _figure(name: str, value: float | None) -> Cell:
    if value is None:
        return Cell(text=words.NONE, sort="")
    if name == "removed":
        text = words.percent(value)
    elif name == "weight_bytes":
        text = words.memory(value)
    elif name in _WHOLE:
        text = words.count(value)
    elif name == "seconds":
        text = f"{value:,.1f}"
    else:
        text = words.decimal(value)
    return Cell(text=text, sort=repr(float(value)))
