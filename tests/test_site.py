"""Every code block and shell line of the site runs, on a small model, with small numbers.

ONNX alone is not written again, which takes longest: `tests/exports/test_onnx.py` does so from the
command line.

The blocks of a page run in their order, in one folder and one namespace. A block with a title is a
file, which is written. Blocks of text are not code; a page says where its commands were not run.
"""

import json
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from conftest import command_line
from transformers import AutoConfig

import prunekit
from prunekit.config import check, compose
from prunekit.jobs.export import ExportSettings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = ("options.md",)
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name not in GENERATED)
FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]+)\")?[^\n]*\n(.*?)^\1```", re.M | re.S)
LANGUAGES = {"python", "sh", "yaml", "toml", "text", "mermaid"}
TEXT = "\n\n".join(f"def number_{n}(x):\n    return x + {n}" for n in range(300))
# What makes a run small; it comes last, and the last one counts.
SMALL = [
    "data.calibration.samples=4",
    "data.calibration.sequence_length=32",
    "data.calibration.batch_size=4",
    "eval.corpora=[text.txt]",
    "eval.window=32",
    "eval.max_tokens=64",
    "eval.prompts=[]",
    "eval.speed=false",
    "eval.macs=0",
    "eval.layer_tokens=0",
    "eval.tasks=[]",
    "eval.cache=null",
]
TRAINING = ["path=text.txt", "samples=8", "length=32", "batch_size=4", "evaluations=1"]
TRAINING += ["holdout=2"]
SEARCH = ["rounds=1", "sweeps=1", "generations=1", "children=2", "seeds=[uniform]"]
GATES = ["train.steps=20", "train.reach=0", "train.learning_rate=1", "pressure=20"]
NEEDS_TEXT = re.compile(r"data=(?!embedded)|data\.calibration\.path=")
PARTS = ("method", "importance", "policy", "scope", "compensation", "schedule", "cost", "data")
PARTS += ("recovery", "export", "eval")
# Launchers and sweepers have a test of their own, `tests/sweeps/test_launchers.py`.
ELSEWHERE = re.compile(r"hydra[/.](launcher|sweeper)[.=]")
HUB = re.compile(r"[\w.-]+/[\w.-]+")


def blocks_of(page):
    for _, language, title, text in FENCE.findall(page.read_text()):
        yield language, title, text


def small_arguments(arguments):
    """The arguments of a command of the site, with small numbers in place of its own."""
    if any(argument.startswith("task=") for argument in arguments):
        task = next(a for a in arguments if a.startswith("task=")).removeprefix("task=")
    else:
        task = "prune"
    small = SMALL if task in ("prune", "search") else []
    if task in ("evaluate", "recover"):
        small = [key for key in SMALL if key.startswith("eval.")]
    if NEEDS_TEXT.search(" ".join(arguments)) and task in ("prune", "search"):
        small = [*small, "data.calibration.path=text.txt"]
    if any(re.match(r"recovery=(?!none)", argument) for argument in arguments):
        small = [*small, *(f"recovery.{line}" for line in TRAINING)]
    if "method=gates" in arguments:
        small = [*small, *(f"importance.{line}" for line in GATES)]
    if any(argument == "policy=search" for argument in arguments):
        small = [*small, *(f"policy.{line}" for line in SEARCH), "data.calibration.samples=8"]
    return [*arguments, *small]


def replace_names(argument, model):
    """Names on the hub, and FOLDER, are the small model."""
    key, _, value = argument.partition("=")
    elsewhere = value == "FOLDER" or (HUB.fullmatch(value) and not Path(value).exists())
    if key in ("model.path", "eval.baseline") and elsewhere:
        return f"{key}={model}"
    return argument


def run_line(line, model):
    """Run one shell line in this process, or check what can't be run here."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        targets = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{re.escape(words[1])}:", targets, re.M), line
    elif words[:2] == ["pip", "install"]:
        extras = set(re.findall(r"[\w]+", "".join(re.findall(r"\[([^\]]+)\]", words[-1]))))
        assert extras <= known_extras(), line
    else:
        run_prunekit(words, line, model)


def run_prunekit(words, line, model):
    """Run `python -m prunekit …` in this process; behind torchrun, as its one process."""
    start = words.index("-m") if words[0] == "torchrun" else 1
    assert words[0] in ("python", "torchrun") and words[start : start + 2] == ["-m", "prunekit"], (
        f"no shell line that the test knows: {line}"
    )
    arguments = [replace_names(word, model) for word in words[start + 2 :]]
    if "--help" not in arguments:
        arguments = small_arguments(arguments)
    if any(map(ELSEWHERE.match, arguments)):
        check(compose([first_value(a) for a in arguments if "=" in a and a[:5] != "hydra"]))
        return
    if "export=onnx" in arguments:
        ExportSettings.build(check(compose(arguments)).export)
        return
    done = command_line(*arguments, cwd=Path.cwd())
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    for folder in Path("outputs").glob("????-??-??"):  # the next run may come in the same second
        shutil.rmtree(folder)


def first_value(override):
    """An override of a sweep with the first of its values: a,b; choice(a,b); interval(a,b)."""
    key, _, values = override.partition("=")
    if values.startswith("["):
        return override
    return f"{key}={re.sub(r'^(choice|interval)', '', values).strip('()').split(',')[0]}"


def known_extras():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


def shell_lines(text):
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture
def place(tmp_path, monkeypatch, short_model):
    """The folder of a page: a text, and the embedded model's first layers in its place."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("prunekit.demo.DEMO_MODEL", short_model)
    monkeypatch.setattr("prunekit.jobs.sources.DEMO_MODEL", short_model)
    torch.manual_seed(0)
    before, load_config = set(sys.modules), vars(AutoConfig)["from_pretrained"]
    yield tmp_path
    AutoConfig.from_pretrained = load_config  # pages register prunekit's classes
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("mypkg", "myrules"):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_block_of_a_page_runs(page, place, short_model):
    names = {"__name__": "__main__"}
    for language, title, text in blocks_of(page):
        assert language in LANGUAGES, f"{page.name}: a block of {language or 'no language'}"
        if title:
            (place / title).parent.mkdir(parents=True, exist_ok=True)
            (place / title).write_text(text)
        elif language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif language == "sh":
            for line in shell_lines(text):
                run_line(line, short_model)
        elif language == "yaml":
            yaml.safe_load(text)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_to_pages_and_headings(page):
    """`make docs` checks the anchors of the site too; this needs no MkDocs."""
    for link in re.findall(r"\]\(([^)\s:]+)\)", page.read_text()):
        file = link.partition("#")[0]
        assert not file or (page.parent / file).exists(), link


def test_the_navigation_holds_every_page_once():
    class Loader(yaml.SafeLoader):
        pass

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    listed = re.findall(r"[\w/-]+\.(?:md|ipynb)", json.dumps(nav))
    there = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(there)


def test_the_api_page_has_every_public_name():
    text = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^::: prunekit\.(\w+)$", text, re.M))
    assert documented >= set(prunekit.__all__)


def test_every_choice_is_listed():
    text = (DOCS / "composing.md").read_text()
    choices = [path for path in (ROOT / "conf").glob("*/*.yaml") if path.parent.name in PARTS]
    assert len(choices) > 40
    assert [path.stem for path in choices if f"`{path.stem}`" not in text] == []


def test_every_model_by_name_has_a_row_with_its_path():
    text = (DOCS / "models.md").read_text()
    models = [path for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem != "demo"]
    assert len(models) == 17
    for path in models:
        hub = yaml.safe_load(path.read_text())["model"]["path"]
        assert re.search(rf"^\| `{path.stem}` \| {re.escape(hub)} \|", text, re.M), path.stem
    for named in re.findall(r"`(tests/\w+\.py)`", text):
        assert (ROOT / named).exists(), named


def test_the_examples_in_docstrings_name_what_exists():
    examples = [
        text
        for name in prunekit.__all__
        for text in re.findall(r"```python\n(.*?)```", getattr(prunekit, name).__doc__, re.S)
    ]
    assert len(examples) >= 6
    for text in examples:
        for call in re.findall(r"prunekit\.(\w+)", textwrap.dedent(text)):
            assert call in prunekit.__all__
        compile(textwrap.dedent(text), "an example", "exec")


@pytest.mark.parametrize("notebook", sorted(DOCS.rglob("*.ipynb")), ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs(notebook, place):
    names = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not kept: they would drift from the code"
            exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
