"""`report.md`: the report for people who read text; its pictures are files beside it."""

from __future__ import annotations

import re

from prunekit.report import words
from prunekit.report.document import Answers, Block, Code, Items, Section, document, title
from prunekit.report.pictures import Picture
from prunekit.report.record import Report
from prunekit.report.tables import Table

# Characters that Markdown gives a meaning; an underscore has one only at the edge of a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")


def render_markdown(report: Report) -> str:
    """`report.md`, in GitHub's dialect; it shows the files that `write_pictures` leaves."""
    lines = [f"# {escape(title(report))}"]
    for section in document(report):
        lines += _section(section)
    return "\n\n".join(lines) + "\n"


def _section(section: Section) -> list[str]:
    return [f"## {section.title}", *(render_block(block) for block in section.blocks)]


def render_block(block: Block) -> str:
    """One block of a section as Markdown."""
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        return f"![{escape(block.label)}]({block.name}.svg)"
    if isinstance(block, Answers):
        return _sample(block)
    if isinstance(block, Code):
        return _fence(block.text, "sh")
    if isinstance(block, Items):
        return "\n".join(f"- {escape(line)}" for line in block.lines)
    return escape(block)


def escape(text: str) -> str:
    """Escape a text and put it on one line, so that Markdown and HTML show it unchanged."""
    line = " ".join(words.plain(text).split())
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", line)


def _table(table: Table) -> str:
    rules = ["---" if i < table.left else "---:" for i in range(len(table.header))]
    lines = [_cells([escape(cell) for cell in table.header]), _cells(rules)]
    lines += [_cells([escape(cell) for cell in row]) for row in table.rows]
    text = "\n".join(lines)
    if not table.folded:
        return text
    return f"<details><summary>{table.caption}</summary>\n\n{text}\n\n</details>"


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _sample(sample: Answers) -> str:
    mode = f" ({escape(sample.mode)})" if sample.mode else ""
    parts = [f"Prompt{mode}:", _fence(sample.prompt)]
    for column, answer in sample.answers.items():
        parts += [f"{escape(column)}:", _fence(answer)]
    return "\n\n".join(parts)


def _fence(text: str, language: str = "") -> str:
    """A code block; its fence is longer than any run of backticks in it."""
    runs = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * max([3, *(run + 1 for run in runs)])
    return f"{fence}{language}\n{words.plain(text)}\n{fence}"
