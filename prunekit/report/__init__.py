"""The report of a run: JSON for programs; Markdown, a page and a terminal's table for people."""

from __future__ import annotations

from prunekit.report.card import model_card
from prunekit.report.markdown import render_markdown
from prunekit.report.page import render_html
from prunekit.report.pictures import pictures, write_pictures
from prunekit.report.record import Report, schema
from prunekit.report.tables import Row, header, rows
from prunekit.report.terminal import print_summary

__all__ = [
    "Report",
    "Row",
    "header",
    "model_card",
    "pictures",
    "print_summary",
    "render_html",
    "render_markdown",
    "rows",
    "schema",
    "write_pictures",
]
