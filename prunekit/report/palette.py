"""The reports' colours, light and dark: after Okabe and Ito's set, which the colour-blind can tell
apart.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#57606b",
    "line": "#d3d9df",
    "track": "#e4e9ee",
    "dense": "#6c757f",
    "pruned": "#0072b2",
    "recovered": "#b85a00",
    "fourth": "#007a5a",
    "fifth": "#a3497f",
}
DARK = {
    "paper": "#12161b",
    "ink": "#e8ecf1",
    "soft": "#a8b2bd",
    "line": "#3a434e",
    "track": "#29313a",
    "dense": "#98a2ad",
    "pruned": "#56b4e9",
    "recovered": "#e69f00",
    "fourth": "#2fc49a",
    "fifth": "#dd93bc",
}
SERIES = ("dense", "pruned", "recovered", "fourth", "fifth")
HATCHES = ("", "///", "xxx", "---", "...")
MARKERS = ("s", "o", "^", "D", "v")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))


def place(column: str, columns: list[str]) -> int:
    """Which colour, hatch, marker and line style a column takes: a model's are the same in every
    report.
    """
    return (
        SERIES.index(column)
        if column in SERIES[:3]
        else 1 + columns.index(column) % (len(SERIES) - 1)
    )


def variables(selector: str) -> str:
    """CSS that sets `--ink` and so on for a selector, by the reader's preference."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in colours.items())
        for colours in (LIGHT, DARK)
    )
    return f"{selector}{{{light}}}\n@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}\n"
