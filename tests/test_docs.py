"""The pages under docs/ that people wrote: the names, pictures and links they use exist."""

import importlib
import re
from pathlib import Path

import pytest

import prunekit

DOCS = Path(__file__).parent.parent / "docs"
PACKAGES = {path.stem for path in Path(prunekit.__file__).parent.iterdir()}


def resolves(name):
    """Whether `prunekit.<name>` is a module, or something that a module defines."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["prunekit", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_names_on_the_architecture_page_exist():
    text = (DOCS / "architecture.md").read_text()
    names = re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", text)
    names = [name for name in names if name.split(".")[0] in PACKAGES]
    assert len(names) > 30
    assert [name for name in names if not resolves(name)] == []


def test_every_package_has_a_place_on_the_architecture_page():
    table = (DOCS / "architecture.md").read_text().partition("## The storeys")[2]
    packages = {path.parent.name for path in Path(prunekit.__file__).parent.glob("*/__init__.py")}
    assert {name for name in packages - {"demo"} if f"`{name}`" not in table} == set()


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", (DOCS / page).read_text()):
        assert (DOCS / link).exists(), link
