"""The rules of the house that a machine can check: imports go one way, no architecture is known by name."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent / "prunekit"
ALLOWED = {
    "errors": set(),
    "console": set(),
    "parallel": {"errors"},
    "graph": {"errors"},
    "data": {"errors"},
    "plan": {"graph", "errors"},
    "policies": {"graph", "errors", "console", "importance", "compensation", "surgery"},
    "compensation": {"live", "graph", "errors", "console", "parallel"},
    "importance": {"live", "graph", "errors", "console", "compensation", "surgery"},
    "live": {"errors"},
    "sizes": {"exports"},
    "layers": {"graph", "sizes", "errors"},
    "surgery": {"live", "graph", "plan", "sizes", "layers", "errors"},
    "costs": {"live", "graph", "plan", "surgery", "policies", "errors", "console"},
    "schedules": {
        "graph",
        "plan",
        "errors",
        "console",
        "parallel",
        "importance",
        "compensation",
        "policies",
        "surgery",
    },
    "evaluation": {"live", "data", "errors", "console", "machine"},
    "recovery": {"data", "live", "machine", "errors", "console"},
    "checkpoint": {"plan", "sizes", "errors", "exports"},
    "exports": {"errors", "console", "checkpoint"},
    "report": {"errors", "graph"},
    "config": {"errors"},
    "demo": {"data"},
}
HELPERS = {"base", "aggregation", "gradients", "activations", "budget", "cost", "scope"}
NAMES = r"llama|mistral|mixtral|qwen|gemma|gpt|bloom|falcon|opt_|phi\d|olmo|baichuan|chatglm|bert"


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).with_suffix("").parts, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prunekit"):
            parts = node.module.split(".")
            yield from [parts[1:]] if len(parts) > 1 else [[alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ([a.name.split(".")[1:]] for a in node.names if a.name.startswith("prunekit."))


def test_imports_go_one_way():
    for parts, tree in modules():
        own = parts[0]
        for target in imported(tree):
            if own in ALLOWED and target[0] != own:
                assert target[0] in ALLOWED[own], f"{'/'.join(parts)} imports {'.'.join(target)}"
            if own == "cli":
                assert target[0] in {"config", "jobs", "errors", "console", "report"}


def test_sibling_backends_import_only_their_base():
    for parts, tree in modules():
        if parts[0] in ("importance", "policies") and parts[-1] not in ("__init__", *HELPERS):
            siblings = {target[1] for target in imported(tree) if target[0] == parts[0] and len(target) > 1}
            assert siblings <= HELPERS, parts


def test_no_architecture_is_known_by_name():
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in ("demo", "exports"):
            continue
        code = re.sub(r"SlimGPT|slimgpt", "", path.read_text())
        assert not re.search(NAMES, code, re.IGNORECASE), path


def test_every_public_thing_has_a_docstring():
    for parts, tree in modules():
        assert ast.get_docstring(tree), parts
