"""Matplotlib's SVG made fit for a page: with text, ids of its own, and a dark style sheet."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from prunekit.report import words
from prunekit.report.palette import LIGHT, dark_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_FONT = "text{font-family:system-ui,sans-serif!important}"
_PAPER = f'<rect width="100%" height="100%" fill="{LIGHT["paper"]}"/>'
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a task may be called a_$b
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": LIGHT["ink"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.labelcolor": LIGHT["soft"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "axes.edgecolor": LIGHT["line"],
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.borderpad": 0,
}


def to_svg(figure: Figure, name: str, label: str) -> str:
    """A figure drawn under `STYLE` as one `<svg role="img">`: the same bytes for the same figure.

    Args:
        figure: the figure.
        name: the name of the picture, its own on a page; its ids are hashed with it.
        label: the text alternative.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs missing from the font that only measures
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(words.plain(buffer.getvalue()))
    _drop_sheets(root)
    _drop_unused_ids(root)
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-label": words.plain(label)}
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def standalone(svg: str) -> str:
    """The same as a file: on paper of its own, light or dark as the reader prefers."""
    head, body = svg.split(">", 1)
    return f"{head}><style>{dark_pictures().strip()}{_FONT}</style>{_PAPER}{body}\n"


def _drop_sheets(root: ElementTree.Element) -> None:
    """Remove matplotlib's sheet for `*`, which would hold for the whole page, and white space."""
    for parent in list(root.iter()):
        for child in list(parent):
            child.tail = None
            if child.tag == f"{{{_SVG}}}style":
                parent.remove(child)
        if parent.tag != f"{{{_SVG}}}text":
            parent.text = None


def _drop_unused_ids(root: ElementTree.Element) -> None:
    """Remove ids that nothing refers to: matplotlib numbers them from 1 in every picture."""
    values = " ".join(value for element in root.iter() for value in element.attrib.values())
    for element in root.iter():
        own = element.get("id")
        if own is not None and f"#{own}" not in values:
            del element.attrib["id"]
