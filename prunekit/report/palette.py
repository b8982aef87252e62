"""The colours of reports, light and dark, which the colour-blind can tell apart (Okabe, Ito)."""

from __future__ import annotations

from collections.abc import Sequence

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


def place(column: str, columns: Sequence[str]) -> int:
    """Which colour, hatch, marker and line style a column takes.

    A model that every report may have takes the same ones in all of them.
    """
    if column in SERIES[:3]:
        return SERIES.index(column)
    return 1 + columns.index(column) % (len(SERIES) - 1)


def variables(selector: str) -> str:
    """CSS that sets `--ink` and the other variables for a selector, as the reader prefers."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in colours.items())
        for colours in (LIGHT, DARK)
    )
    return f"{selector}{{{light}}}\n@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}\n"


def dark_pictures() -> str:
    """CSS that turns pictures drawn in `LIGHT` dark where the reader prefers that.

    matplotlib writes a colour into the `style` of each element, or into its `fill`; the rules find
    it there. They name no parent: a browser matches what a `<use>` repeats, as markers are, without
    the elements around it.
    """
    rules = []
    for name, light in LIGHT.items():
        filled = f'[style*="fill: {light}"],[fill="{light}"]'
        rules.append(f"{filled}{{fill:{DARK[name]}!important}}")
        rules.append(f'[style*="stroke: {light}"]{{stroke:{DARK[name]}!important}}')
    return f"@media (prefers-color-scheme:dark){{{''.join(rules)}}}\n"
