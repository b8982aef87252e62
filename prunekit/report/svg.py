"""Matplotlib's SVG made fit for a page: colours become CSS variables, text stays text, ids are the
picture's own.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from prunekit.report import words
from prunekit.report.palette import LIGHT, variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_NUMBERS = re.compile(r"-?\d+\.\d{3,}")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prunekit",
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
    """A figure drawn under `STYLE` as one `<svg role="img">`; `name` begins its ids, `label` says
    what it shows.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs missing from the font that only measures
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(words.plain(buffer.getvalue()))
    _own_ids(root, name)
    for element in root.iter():
        _clean(element)
    box = root.attrib["viewBox"]
    root.attrib = {
        "viewBox": box,
        "role": "img",
        "aria-label": words.plain(label),
        "style": "stroke-linejoin:round",
    }
    _unnest(root)
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode")


def standalone(svg: str) -> str:
    """The same as a file: on paper of its own, light or dark as the reader prefers."""
    style = variables("svg").replace("\n", "") + "text{font-family:system-ui,sans-serif}"
    _, _, width, height = re.findall(r"[\d.]+", svg[svg.index("viewBox") : svg.index("role=")])
    paper = f'<rect width="{width}" height="{height}" style="fill:var(--paper,{LIGHT["paper"]})"/>'
    head, body = svg.split(">", 1)
    return f"{head}><style>{style}</style>{paper}{body}\n"


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Short ids that begin with the picture's name, where anything refers to them; none elsewhere."""
    whole = ElementTree.tostring(root, encoding="unicode")
    used = list(dict.fromkeys(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', whole)))
    new = {a or b: f"{name}-{i}" for i, (a, b) in enumerate(used)}
    for element in root.iter():
        if (old := element.attrib.pop("id", None)) in new:
            element.set("id", new[old])
        if _HREF in element.attrib:
            element.set("href", f"#{new[element.attrib.pop(_HREF)[1:]]}")
        for key, value in element.attrib.items():
            element.set(key, re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{new[m[1]]})", value))


def _clean(element: ElementTree.Element) -> None:
    tag = element.tag.removeprefix(f"{{{_SVG}}}")
    style = dict(part.split(": ", 1) for part in element.get("style", "").split("; ") if part)
    if tag == "text":
        style.pop("font-family", None)
    if element.get("fill", "none") != "none":  # a variable works in a style only
        style["fill"] = element.attrib.pop("fill")
    if re.match(r"rotate\(-?0 ", element.get("transform", "")):
        del element.attrib["transform"]
    if style:
        element.set("style", ";".join(f"{key}:{_colour(value)}" for key, value in style.items()))
    for key in ("d", "x", "y", "width", "height", "points", "transform"):
        if key in element.attrib:
            value = " ".join(element.attrib[key].split())
            element.set(
                key, _NUMBERS.sub(lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)
            )
    if tag != "text":
        element.text = None
    element.tail = None


def _colour(value: str) -> str:
    name = next((name for name, colour in LIGHT.items() if colour == value.lower()), None)
    return f"var(--{name},{value})" if name else value


def _unnest(element: ElementTree.Element) -> None:
    """Drop the sheet for `*` (it would hold for the whole page) and groups that say nothing."""
    for child in list(element):
        _unnest(child)
        at = list(element).index(child)
        if child.tag == f"{{{_SVG}}}style" or (child.tag == f"{{{_SVG}}}defs" and not len(child)):
            element.remove(child)
        elif child.tag == f"{{{_SVG}}}g" and not child.attrib:
            element.remove(child)
            for i, grandchild in enumerate(list(child)):
                element.insert(at + i, grandchild)
