"""Backends of a package that is not prunekit's: by object, by `_target_`, by a folder of configs.

The package is built by setuptools, which torch depends on, and installed by pip, offline.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import command_line, tiny_llama, token_ids
from torch import nn

import prunekit
from prunekit import config as cfg
from prunekit.errors import ConfigError, TraceError

BACKENDS = '''
"""One backend of each kind; every one notes that it was asked."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from prunekit.allocation.costs.base import CostModel
from prunekit.allocation.costs.parameters import Parameters
from prunekit.compensation import Compensation
from prunekit.exports import Export, Written
from prunekit.importance import ScoreImportance
from prunekit.policies import DepthPolicy
from prunekit.schedules import OneShot

ASKED = []


@dataclass(frozen=True, kw_only=True)
class Last(ScoreImportance):
    """The last units go first."""

    start: float = 1.0

    def structures(self, model, graph, groups, batches):
        ASKED.append(self)
        sizes = {g.name: g.num_units for g in groups}
        return {n: self.start + torch.arange(s, 0, -1.0).double()[None] for n, s in sizes.items()}


@dataclass(frozen=True, kw_only=True)
class Alternating(DepthPolicy):
    """Every other layer."""

    first: int = 0

    def shares(self, depth):
        ASKED.append(self)
        return [float(layer % 2 == self.first) for layer in range(depth)]


@dataclass(frozen=True, kw_only=True)
class Halve(Compensation):
    """Halves what stays: easily told from all others."""

    by: float = 2.0

    def repair(self, weight, statistics, removed):
        ASKED.append(self)
        return weight.index_fill(1, removed, 0) / self.by, None


@dataclass(frozen=True, kw_only=True)
class Noted(OneShot):
    """One shot, noted."""

    def run(self, assignment):
        ASKED.append(self)
        return super().run(assignment)


@dataclass(frozen=True, kw_only=True)
class Thousands(CostModel):
    """Parameters in thousands."""

    name: ClassVar[str] = "thousands"
    per: int = 1000

    def measure(self, setting):
        ASKED.append(self)
        cost = Parameters().measure(setting)
        terms = tuple(replace(t, coefficient=t.coefficient / self.per) for t in cost.terms)
        return replace(cost, name=self.name, terms=terms, stored=False)


@dataclass(frozen=True, kw_only=True)
class Names(Export):
    """The names of the parameters, one a line."""

    name: ClassVar[str] = "names"
    ending: str = "txt"

    @property
    def target(self):
        return f"names.{self.ending}"

    def check_model(self, model):
        ASKED.append(self)

    def create(self, path, model, tokenizer):
        ASKED.append(self)
        path.write_text("\\n".join(name for name, _ in model.named_parameters()))
        return Written(file=path, about="names of parameters")
'''
RULES = '''
"""An operator that torch doesn't know, and its rule."""

import torch
from prunekit.graph import operator_rule


@torch.library.custom_op("mypkg::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    """Twice the numbers."""
    return x * 2


@double.register_fake
def _(x):
    return torch.empty_like(x)


def register():
    """What importing a module of rules does; a function, so that the test can come first."""

    @operator_rule("mypkg.double.default")
    def rule(call):
        return call.elementwise(call.value("x"))
'''
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "mypkg"
version = "1"

[tool.setuptools]
packages = ["mypkg", "mypkg.conf"]
package-data = { "*" = ["*/*.yaml"] }
"""
OFFLINE = ("--quiet", "--disable-pip-version-check")
OFFLINE += ("--no-deps", "--no-index", "--no-build-isolation")
# Group → class, an option that only it has and its value, a choice that exists in prunekit.
KINDS = {
    "importance": ("Last", "start", 3.0, "magnitude"),
    "policy": ("Alternating", "first", 1, "uniform"),
    "compensation": ("Halve", "by", 4.0, "obs"),
    "schedule": ("Noted", "damping", 0.5, "layerwise"),
    "cost": ("Thousands", "per", 500, "parameters"),
}
BASE = {"importance": "magnitude", "policy": "uniform", "compensation": "none"}
BASE |= {"schedule": "oneshot", "cost": "parameters"}


@pytest.fixture(scope="module")
def mypkg(tmp_path_factory):
    """A package of somebody else's with a folder of configs, installed by pip; where it lies."""
    source = tmp_path_factory.mktemp("source")
    package = source / "mypkg"
    package.mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (package / "__init__.py").write_text("")
    (package / "backends.py").write_text(BACKENDS)
    (package / "rules.py").write_text(RULES)
    (package / "registers.py").write_text("from mypkg.rules import register\n\nregister()\n")
    (package / "conf").mkdir()
    (package / "conf" / "__init__.py").write_text("")
    for group, (name, option, value, _) in {**KINDS, "export": EXPORT}.items():
        (package / "conf" / group).mkdir()
        text = f"_target_: mypkg.backends.{name}\n{option}: {value}\n"
        (package / "conf" / group / "mine.yaml").write_text(text)
    folder = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", *OFFLINE, "--target", folder, source]
    subprocess.run(install, check=True)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "mypkg"]:
        del sys.modules[name]


EXPORT = ("Names", "ending", "lst", "gguf")


def asked():
    """What the package's backends noted since the last call."""
    notes = importlib.import_module("mypkg.backends").ASKED
    found = list(notes)
    notes.clear()
    return found


def prune(*overrides, **choices):
    """Prune a small model with one backend of the package's and plain ones beside it."""
    asked()
    own = {group: choice for group, choice in BASE.items() if group not in choices}
    own = {g: c for g, c in own.items() if not any(o.startswith(f"{g}=") for o in overrides)}
    result = prunekit.prune(
        tiny_llama(),
        ratio=0.2,
        calibration=token_ids(4, 8),
        overrides=list(overrides),
        **own,
        **choices,
    )
    return result, asked()


@pytest.mark.parametrize("group", KINDS)
def test_an_object_a_target_and_a_folder_of_configs(group, mypkg):
    name, option, value, preset = KINDS[group]
    mine = getattr(importlib.import_module("mypkg.backends"), name)
    by_object, (first, *_) = prune(**{group: mine(**{option: value})})
    target = f"{group}._target_=mypkg.backends.{name}"
    by_target, (second, *_) = prune(f"{group}={preset}", target, f"++{group}.{option}={value}")
    search = "hydra.searchpath=[pkg://mypkg.conf]"
    by_folder, (third, *_) = prune(search, f"{group}=mine")
    assert first == second == third == mine(**{option: value})
    assert by_object.plan == by_target.plan == by_folder.plan
    assert by_object.plan.removed
    plain, notes = prune(f"{group}={preset}", target)
    assert notes[0] == mine(), "the class's own defaults, nothing of the preset it replaces"
    if group == "cost":
        target = plain.report["target"]
        assert target["measure"] == "thousands"
        assert target["dense"] * 1000 == plain.report["parameters"]["dense"]


def test_the_same_on_the_command_line(mypkg, tmp_path):
    quick = ["eval=none", "method=magnitude", "data.calibration.samples=4", "ratio=0.2"]
    target = ["importance._target_=mypkg.backends.Last", "+importance.start=3"]
    folder = [f"hydra.searchpath=[file://{mypkg}/mypkg/conf]", "importance=mine"]
    package = ["hydra.searchpath=[pkg://mypkg.conf]", "importance=mine"]
    plans = []
    for i, own in enumerate((target, folder, package)):
        done = command_line(*quick, *own, f"output_dir=out{i}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        plans.append((tmp_path / f"out{i}" / "plan.json").read_text())
    assert plans[0] == plans[1] == plans[2]
    units = json.loads(plans[0])["removed"]["layers.0.mlp"]
    assert units == list(range(640 - len(units), 640))
    kept = (tmp_path / "out0" / ".hydra" / "config.yaml").read_text()
    assert "mypkg.backends.Last" in kept and "p: 2" not in kept


def test_an_unknown_choice_beside_a_search_path_is_one_line_with_all_choices(mypkg, tmp_path):
    done = command_line(
        "hydra.searchpath=[pkg://mypkg.conf]", "importance=mien", "output_dir=out", cwd=tmp_path
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "importance: unknown choice 'mien': did you mean mine" in line
    assert "taylor_first" in line
    with pytest.raises(ConfigError, match="policy: unknown choice 'unifrom': did you mean unif"):
        cfg.compose(["hydra.searchpath=[pkg://mypkg.conf]", "policy=unifrom"])


def test_an_export_of_ones_own(mypkg, tmp_path):
    dense = tiny_llama()
    prunekit.save_pretrained(dense, tmp_path / "model")
    tokenizer = prunekit.checkpoint.load_tokenizer(DEMO, False)
    names = [name for name, _ in prunekit.from_pretrained(tmp_path / "model").named_parameters()]
    mine = importlib.import_module("mypkg.backends").Names
    searched = ["hydra.searchpath=[pkg://mypkg.conf]"]
    target = ["export=gguf", "export._target_=mypkg.backends.Names", "++export.ending=lst"]
    for i, options in enumerate(
        (
            {"format": mine(ending="lst")},
            {"format": "mine", "overrides": searched},
            {"overrides": target},
        )
    ):
        (path,) = prunekit.export(dense, tmp_path / f"out{i}", tokenizer=tokenizer, **options)
        assert path == tmp_path / f"out{i}" / "names.lst"
        assert path.read_text().splitlines() == names


def test_an_operator_rule_of_ones_own(mypkg, tmp_path):
    rules = importlib.import_module("mypkg.rules")

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

        def forward(self, x):
            return self.second(rules.double(torch.relu(self.first(x))))

    def run(*overrides):
        torch.manual_seed(0)
        return prunekit.prune(
            Doubled(),
            ratio=0.3,
            method="magnitude",
            calibration=[{"x": torch.randn(4, 6)}],
            overrides=list(overrides),
        )

    with pytest.raises(TraceError, match="mypkg.double"):
        run()
    result = run("imports=[mypkg.registers]")
    assert result.model.first.out_features == result.model.second.in_features < 12
    done = command_line("task=trace", "imports=mypkg.registers", "output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command_line("task=trace", "imports=[mypkg.nowhere]", "output_dir=no", cwd=tmp_path)
    assert done.returncode == 2
    assert "imports: expected modules that Python can import, got mypkg.nowhere" in done.stderr


DEMO = Path(prunekit.__file__).parent / "demo" / "model"
