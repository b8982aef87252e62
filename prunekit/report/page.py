"""`report.html`: one file that loads nothing, with its pictures inside, light or dark as the reader
prefers.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from prunekit.report import words
from prunekit.report.document import Block, Code, Items, Sample, Section, document, title
from prunekit.report.palette import variables
from prunekit.report.pictures import Picture
from prunekit.report.tables import Table

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{sections}
</main>
</body>
</html>
"""


def render_html(report: Mapping[str, Any]) -> str:
    """`report.html`: no script, nothing from elsewhere; what users supplied is escaped."""
    style = variables(":root") + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    sections = "\n".join(_section(section) for section in document(report))
    return _PAGE.format(title=_text(title(report)), style=style, sections=sections)


def _section(section: Section) -> str:
    name = section.title.lower().replace(" ", "-")
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{_text(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        return f'<figure tabindex="0">{block.svg()}</figure>'
    if isinstance(block, Sample):
        return _sample(block)
    if isinstance(block, Code):
        return f'<pre tabindex="0"><code>{_text(block.text)}</code></pre>'
    if isinstance(block, Items):
        return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in block.lines)}</ul>"
    return f"<p>{_text(block)}</p>"


def _text(text: str) -> str:
    return escape(words.plain(text))


def _table(table: Table) -> str:
    head = "".join(
        _cell(cell, i < table.left, 'th scope="col"') if cell else "<td></td>"
        for i, cell in enumerate(table.header)
    )
    tag = '<table class="strong">' if table.strong else "<table>"
    lines = [
        f"{tag}<caption>{_text(table.caption)}</caption>",
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
    ]
    for first, *others in table.rows:
        cells = "".join(_cell(cell, i < table.left, "td") for i, cell in enumerate(others, 1))
        name = _cell(first, True, 'th scope="row"').replace("_", "_<wbr>")
        lines.append(f"<tr>{name}{cells}</tr>")
    wide = '<div class="wide" tabindex="0">' + "\n".join([*lines, "</tbody></table></div>"])
    return (
        f"<details><summary>{_text(table.caption)}</summary>{wide}</details>"
        if table.folded
        else wide
    )


def _cell(text: str, words_: bool, tag: str) -> str:
    kind = ' class="w"' if words_ else ""
    return f"<{tag}{kind}>{_text(text)}</{tag.split()[0]}>"


def _sample(sample: Sample) -> str:
    mode = f" <small>{_text(sample.mode)}</small>" if sample.mode else ""
    parts = [
        f'<article><h3>Prompt{mode}</h3>\n<div class="text prompt" dir="auto">{_text(sample.prompt)}</div>\n<dl>'
    ]
    for column, answer in sample.answers.items():
        parts.append(f'<dt>{_text(column)}</dt><dd class="text" dir="auto">{_text(answer)}</dd>')
    return "\n".join([*parts, "</dl></article>"])
