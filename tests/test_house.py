"""The rules of the house that a machine can check: storeys, names, lengths, docstrings.

Closed by default: a package or a top-level module that STOREYS does not list fails.
"""

import ast
import re
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent / "prunekit"
TESTS = Path(__file__).parent

# Package or top-level module → what it may import of prunekit, lazily or not. Each stands above
# all that it names.
STOREYS = {
    "errors": set(),
    "config": {"errors"},
    "runtime": {"errors"},
    "data": {"errors", "model"},
    "model": {"errors", "runtime"},
    "graph": {"errors", "model"},
    "plan": {"errors", "graph"},
    "surgery": {"errors", "graph", "model", "plan", "runtime"},
    "obs": {"errors"},
    "calibration": {"data", "errors", "graph", "model", "obs", "runtime"},
    "allocation": {"config", "data", "errors", "graph", "model", "plan", "runtime", "surgery"},
    "gates": {"calibration", "data", "errors", "graph", "model", "runtime", "surgery"},
    "importance": {
        "calibration",
        "data",
        "errors",
        "gates",
        "graph",
        "model",
        "obs",
        "runtime",
        "surgery",
    },
    "policies": {
        "allocation",
        "calibration",
        "compensation",
        "data",
        "errors",
        "graph",
        "importance",
        "obs",
        "runtime",
        "surgery",
    },
    "compensation": {"calibration", "errors", "obs"},
    "schedules": {
        "allocation",
        "calibration",
        "compensation",
        "config",
        "data",
        "errors",
        "gates",
        "graph",
        "importance",
        "plan",
        "policies",
        "runtime",
        "surgery",
    },
    "checkpoint": {"calibration", "errors", "graph", "model", "plan", "runtime", "surgery"},
    "exports": {"errors", "model", "runtime"},
    "recovery": {"data", "errors", "model", "runtime"},
    "evaluation": {"config", "data", "errors", "model", "runtime"},
    "report": {"errors", "graph", "plan"},
    "search": {
        "allocation",
        "calibration",
        "data",
        "errors",
        "graph",
        "importance",
        "model",
        "policies",
        "report",
        "runtime",
        "schedules",
    },
    "pipeline": {
        "allocation",
        "calibration",
        "checkpoint",
        "compensation",
        "config",
        "data",
        "errors",
        "graph",
        "importance",
        "model",
        "plan",
        "policies",
        "report",
        "runtime",
        "schedules",
        "surgery",
    },
    "demo": {"data"},
    "jobs": {
        "allocation",
        "calibration",
        "checkpoint",
        "compensation",
        "config",
        "data",
        "demo",
        "errors",
        "evaluation",
        "exports",
        "graph",
        "importance",
        "model",
        "pipeline",
        "plan",
        "policies",
        "recovery",
        "report",
        "runtime",
        "schedules",
        "surgery",
    },
    "sweeps": {"config", "errors", "report", "runtime"},
    "cli": {"config", "errors", "jobs", "report", "runtime", "sweeps"},
    "__main__": {"cli"},
    "__init__": {"checkpoint", "errors", "graph", "jobs", "pipeline", "plan", "report", "surgery"},
}
# What backends of one kind share; beside these a backend imports no other one.
SHARED = {
    "importance": {"aggregation", "base", "learned", "seeds", "structures"},
    "policies": {"base", "knapsack", "ramp"},
    "compensation": {"base"},
    "allocation/costs": {"base", "curves", "forward", "terms", "timing", "weights"},
}
# Where an architecture may be known by its name, or by an attribute that only it has.
NAMED = ("exports", "demo/train.py", "model/names.py")
NAMES = r"llama|mistral|mixtral|qwen|gemma|gpt|bloom|falcon|opt_|phi\d|olmo|baichuan|chatglm|bert"
PRIVATE = r"first_k_dense_replace|moe_topk|moe_k\b|top_k_experts|max_window_layers|n_routed_experts"
LONGEST = 40  # lines of code of a function, its docstring and comments aside


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def own_place(path):
    return path.with_suffix("").parts[0]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prunekit"):
            parts = node.module.split(".")
            yield from [parts[1:]] if len(parts) > 1 else [[alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1:] for a in node.names if a.name.startswith("prunekit."))


def test_every_package_and_module_is_listed():
    found = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/*.py")}
    assert found == STOREYS.keys()


def test_imports_go_down_the_storeys():
    for path, tree in modules():
        own = own_place(path)
        for target in imported(tree):
            if target[0] != own and target[0] != "__version__":
                assert target[0] in STOREYS[own], f"{path} imports prunekit.{'.'.join(target)}"


def test_storeys_have_no_cycle_and_allow_no_more_than_is_used():
    graph = networkx.DiGraph((own, other) for own, others in STOREYS.items() for other in others)
    assert networkx.is_directed_acyclic_graph(graph)
    used = {own: set() for own in STOREYS}
    for path, tree in modules():
        used[own_place(path)] |= {target[0] for target in imported(tree)} - {own_place(path)}
    assert {own: others - used[own] for own, others in STOREYS.items() if others - used[own]} == {}


def test_backends_import_only_what_their_kind_shares():
    for folder, shared in SHARED.items():
        package = folder.split("/")
        for path in (ROOT / folder).glob("*.py"):
            if path.stem not in ("__init__", *shared):
                targets = imported(ast.parse(path.read_text()))
                siblings = {
                    target[len(package)]
                    for target in targets
                    if target[: len(package)] == package and target[len(package) :]
                }
                assert siblings <= shared, path


@pytest.mark.parametrize("pattern", [NAMES, PRIVATE])
def test_no_architecture_is_known_by_name(pattern):
    for path, _ in modules():
        if not str(path).startswith(NAMED):
            # Names of a method, of roles in recorded chats, and of a program.
            known = r"SlimGPT|slimgpt|\"(chat)?gpt\"|llama\.cpp"
            text = re.sub(known, "", (ROOT / path).read_text())
            assert not (found := re.search(pattern, text, re.IGNORECASE)), (path, found)


def lines_of_code(text, node):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    strings = {
        line
        for inner in ast.walk(node)
        if isinstance(inner, documented) and ast.get_docstring(inner)
        for line in range(inner.body[0].lineno, inner.body[0].end_lineno + 1)
    }
    lines = enumerate(text.splitlines()[node.lineno - 1 : node.end_lineno], start=node.lineno)
    code = [n for n, line in lines if line.strip() and not line.strip().startswith("#")]
    return len(set(code) - strings)


def test_no_function_is_long():
    for path, tree in modules():
        text = (ROOT / path).read_text()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert lines_of_code(text, node) <= LONGEST, f"{path}: {node.name}"


def test_every_public_thing_has_a_docstring():
    for path, tree in modules():
        assert ast.get_docstring(tree), path
        nodes = [*tree.body]
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"
                if isinstance(node, ast.ClassDef):
                    nodes += node.body


def test_tests_mirror_the_packages():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    folders = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    assert folders <= packages
    untested = packages - folders
    assert untested == set()
