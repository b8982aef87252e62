"""`report.html`: one file with its pictures inside, light or dark as the reader prefers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.report import words
from prunekit.report.document import Answers, Code, Items, document, title
from prunekit.report.palette import dark_pictures, variables
from prunekit.report.pictures import Picture
from prunekit.report.record import Report
from prunekit.report.tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from markupsafe import Markup

_FOLDER = Path(__file__).parent
_BLOCKS = {"table": Table, "picture": Picture, "sample": Answers, "code": Code, "items": Items}


def render_html(report: Report, drawn: Mapping[str, Picture] | None = None) -> str:
    """`report.html`: no script, nothing from elsewhere; text that users supplied is escaped.

    Args:
        report: the figures.
        drawn: its `pictures`, where they are drawn already.
    """
    sections = document(report, drawn)
    return _template().render(title=title(report), style=style_sheet(), sections=sections)


def style_sheet() -> str:
    """The CSS of a page, light or dark, and of the pictures in it."""
    sheet = (_FOLDER / "page.css").read_text(encoding="utf-8")
    return variables(":root") + dark_pictures() + sheet


@cache
def _template() -> Template:
    """The page's template."""
    own = environment(_FOLDER)
    own.filters["breakable"] = _breakable
    own.tests |= {name: _is_a(kind) for name, kind in _BLOCKS.items()}
    return own.get_template("page.html.j2")


def environment(folder: Path) -> Environment:
    """Templates of a folder that escape all text, and replace control characters in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_plain_text,
    )


def _plain_text(value: object) -> object:
    """Text without control characters; markup as it is."""
    return words.plain(value) if type(value) is str else value


def _breakable(text: str) -> Markup:
    """Text that a line may break in after each underscore, as in names of tasks."""
    from markupsafe import Markup, escape

    return escape(words.plain(text)).replace("_", Markup("_<wbr>"))


def _is_a(kind: type) -> Callable[[object], bool]:
    return lambda block: isinstance(block, kind)
