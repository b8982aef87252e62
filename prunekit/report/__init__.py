"""The report of a run: JSON for programs, Markdown and a page with pictures for people, a table for
the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prunekit.report.card import model_card
from prunekit.report.markdown import render_markdown
from prunekit.report.page import render_html
from prunekit.report.pictures import pictures, write_pictures
from prunekit.report.tables import Row, header, rows
from prunekit.report.terminal import print_summary

__all__ = [
    "Row",
    "header",
    "model_card",
    "pictures",
    "print_summary",
    "render_html",
    "render_markdown",
    "rows",
    "to_json",
    "write_pictures",
]


def to_json(report: Mapping[str, Any]) -> str:
    """`report.json`."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"
