"""The reports against the figures they render: every part comes and goes with its key, and what
users wrote stays text.
"""

import copy
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from prunekit.report import (
    Report,
    header,
    pictures,
    print_summary,
    render_html,
    render_markdown,
    rows,
    write_pictures,
)
from prunekit.report.palette import DARK, HATCHES, LIGHT, MARKERS, SERIES, STYLES
from prunekit.report.pictures import Picture
from prunekit.report.units import units

NASTY = (
    """<script>alert("1 & 2")</script> | `a` ```b``` *c* $d$ [e](http://f) """
    """\\ 'g'\x1b[31m\x00\nline"""
)


def make_search(groups):
    """The figures of a search of two rounds."""
    cuts = {
        name: {
            "fitness": 0.2 - 0.01 * k,
            "held_out": 0.21 - 0.01 * k,
            "lead": 0.03 - 0.01 * k,
            "lead_error": 0.002,
            "shares": dict.fromkeys(groups, 0.1 * (k + 1)),
        }
        for k, name in enumerate(("uniform", "knapsack", "round 1", "round 2"))
    }
    rounds = [
        {
            "step": step,
            "database_bytes": 3 * 2**20,
            "evaluations": 180,
            "tokens": 90_000,
            "curve": [
                {"evaluations": 20 * k, "divergence": 0.2 - step / 10 - 0.01 * k}
                for k in range(1, 10)
            ],
        }
        for step in (0.125, 0.0625)
    ]
    return {
        "taken": "round 2",
        "verdict": "the search's winner leads every seed",
        "cuts": cuts,
        "rounds": rounds,
        "prices": dict.fromkeys(groups, 0.0125),
        "evaluations": 360,
        "passes": 11.0,
        "samples": {"database": 80, "fitness": 32, "held_out": 16},
    }


def make(layers=6, recovered=True, kinds=("attention", "mlp")):
    """A whole report of made-up figures; `kinds` are cut in every layer."""
    models = ["dense", "pruned", "recovered"] if recovered else ["dense", "pruned"]

    def each(*values):
        return dict(zip(models, values, strict=False))

    def score(*values):
        return {m: {"value": v, "stderr": 0.02} for m, v in each(*values).items()}

    totals = {"attention": 32, "mlp": 11008, "query_head": 64, "expert": 64}
    wanted = [0.1 + 0.3 * math.log1p(i) / math.log1p(layers) for i in range(layers)]
    curve = [
        {
            "step": 0,
            "tokens": 0,
            "validation_loss": 2.9,
            "perplexity": {"validation": 18.2, "wikitext": 31.9},
        }
    ]
    for step in range(10, 210, 10):
        row = {
            "step": step,
            "tokens": 4096 * step,
            "loss": 2.1 + 0.8 * math.exp(-step / 40),
            "learning_rate": 1e-4,
        }
        if step % 40 == 0:
            loss = 2.2 + 0.6 * math.exp(-step / 50)
            row |= {
                "validation_loss": loss,
                "perplexity": {"validation": math.exp(loss), "wikitext": 14 + 800 / step},
            }
        curve.append(row)
    report = {
        "task": "prune",
        "models": models,
        "method": "slimgpt",
        "seed": 0,
        "versions": {"python": "3.11.2", "prunekit": "0.1.0", "torch": "2.13.0"},
        "command": "python -m prunekit method=slimgpt ratio=0.2 'data.calibration.path=a b.txt'",
        "ratio": {"target": 0.2, "achieved": 0.1999},
        "parameters": each(6_738_415_616, 5_391_000_123, 5_391_000_123),
        "weight_bytes": each(13_476_831_232, 10_782_000_246, 10_782_000_246),
        "macs": each(424 * 10**9, 339 * 10**9, 339 * 10**9),
        "macs_protocol": "one forward pass of 64 tokens",
        "macs_by_module": {
            m: {"attention": 14 * 10**10, "mlp": 27 * 10**10, "head": 84 * 10**8} for m in models
        },
        "perplexity": {
            "wikitext": each(5.68, 9.41, 7.02) | {"protocol": "65,536 tokens, windows of 128"},
            "ptb": each(27.34, 41.5, 33.123) | {"protocol": "65,536 tokens, windows of 128"},
        },
        "tasks": {
            "boolq": {"metric": "acc", "samples": 500, "fewshot": 0} | score(0.751, 0.66, 0.71),
            "piqa": {"metric": "acc_norm", "samples": 500, "fewshot": 0}
            | score(0.788, 0.742, 0.766),
            "arc_challenge": {"metric": "acc_norm", "samples": 500, "fewshot": 0}
            | score(0.4, 0.33, 0.36),
            "mmlu": {"metric": "acc", "samples": 900, "fewshot": 5} | score(0.45, 0.31, 0.38),
            "mmlu_law": {"metric": "acc", "samples": 100, "fewshot": 5, "of": "mmlu"}
            | score(0.41, 0.3, 0.35),
            "average": {"metric": "mean of acc and acc_norm", "samples": 1500, "fewshot": None}
            | score(0.597, 0.51, 0.554),
        },
        "latency": {
            "prefill_tokens_per_second": each(1200.0, 1400.0, 1400.0),
            "decode_tokens_per_second": each(21.5, 24.75, 24.7),
            "protocol": "batch of 8 by 128 tokens, median of 5 in turn",
        },
        "evaluation_bytes": each(14 * 2**30, 12 * 2**30, 12 * 2**30),
        "warnings": ["layers.3.mlp: 683 channels are no multiple of 8"],
        "policy": {
            "shares": {
                f"model.layers.{i}.{kind}": 3 * wanted[i] for i in range(layers) for kind in kinds
            },
            "search": make_search([f"model.layers.{i}.{kind}" for i in range(2) for kind in kinds]),
        },
        "layers": [
            {"index": i}
            | {
                kind: {"kept": round((1 - share) * totals[kind]), "total": totals[kind]}
                for kind in kinds
            }
            for i, share in enumerate(wanted)
        ],
        "layer_error": [
            {"index": i} | {model: 0.002 * 1.3**i / k for k, model in enumerate(models[1:], 1)}
            for i in range(layers)
        ],
        "samples": [
            {"prompt": "Once upon a time", "mode": "greedy"}
            | {m: f"there was a {m} model.\nIt ran." for m in models},
            {"prompt": "The", "mode": "sampled, temperature 0.8, seed 0"}
            | dict.fromkeys(models, "cat " * 60),
        ],
        "seconds": {"load": 3.21, "prune": 754.0, "save": 12.0},
        "peak_memory_bytes": {"load": 2**30, "prune": 17 * 2**30, "save": 2**30},
    }
    if recovered:
        settings = {"rank": 8, "learning_rate": 1e-4, "targets": ["all"]}
        report["recovery"] = {
            "curve": curve,
            "steps": 200,
            "stopped_early": False,
            "best_step": 160,
            "trainable_parameters": 19_988_480,
            "examples": 50_000,
            "tokens": 819_200,
            "seconds": 321.5,
            "settings": settings,
        }
    return report


def read(plain):
    """A report of the mapping; a test may leave out what it does not look at."""
    plain = copy.deepcopy(plain)
    for task in (plain.get("tasks") or {}).values():
        task.setdefault("metric", "acc")
        task.setdefault("samples", 10)
    recovery = plain.get("recovery")
    if recovery is not None:
        zeros = ("steps", "best_step", "trainable_parameters", "examples", "tokens", "seconds")
        rest = dict.fromkeys(zeros, 0) | {"stopped_early": False, "settings": {}}
        plain["recovery"] = rest | recovery
    return Report.from_plain(plain)


class Page(HTMLParser):
    """Elements with their attributes and text; complains where tags don't balance."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def markdown_tables(text):
    """Tables of cells as a Markdown reader sees them, and the rest of the tokens."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found = []
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in tokens[i + 1].children))
    return found, tokens


@pytest.fixture(scope="module")
def report():
    return Report.from_plain(make())


@pytest.fixture(scope="module")
def page(report):
    return render_html(report)


def test_rows_are_the_figures_of_the_report(report):
    table = {row[0]: row[1:] for row in rows(report)}
    assert header(report) == ("", "dense", "pruned", "recovered", "change")
    assert table["parameters"] == ("6,738,415,616", "5,391,000,123", "5,391,000,123", "-20.0%")
    assert table["weights"][:2] == (
        f"{13_476_831_232 / 2**30:.2f} GiB",
        f"{10_782_000_246 / 2**30:.2f} GiB",
    )
    assert table["MACs"][:2] == ("424.0 G", "339.0 G")
    assert table["perplexity, wikitext"] == ("5.680", "9.410", "7.020", f"{7.02 / 5.68 - 1:+.1%}")
    assert table["perplexity, ptb"] == ("27.34", "41.50", "33.12", "+21.2%")
    assert table["boolq, acc"] == ("75.1% ± 2.0", "66.0% ± 2.0", "71.0% ± 2.0", "-4.1 points")
    assert table["decode, tokens/s"] == ("21.50", "24.75", "24.70", "+14.9%")
    assert list(table)[-1] == "average, mean of acc and acc_norm"
    assert not any("mmlu_law" in name for name in table), "a member of a group is no row of its own"


def test_scores_beyond_one_are_no_percentages():
    given = make(2, recovered=False)
    given["tasks"] = {
        "wikitext": {
            "dense": {"value": 13.3129},
            "pruned": {"value": 26.6258},
            "metric": "word_perplexity",
        }
    }
    assert rows(read(given))[-1] == ("wikitext, word_perplexity", "13.31", "26.63", "+100.0%")
    assert "tasks" not in pictures(read(given))


@pytest.mark.parametrize("models", [["model"], ["dense", "model"], ["pruned", "recovered"]])
def test_other_tasks_have_their_own_columns(models, tmp_path, capsys):
    given = {
        "task": "recover" if "recovered" in models else "evaluate",
        "models": models,
        "parameters": dict.fromkeys(models, 1000),
        "perplexity": {"ptb": {model: 10.0 + i for i, model in enumerate(models)}},
        "tasks": {"piqa": {model: {"value": 0.5 + i / 10} for i, model in enumerate(models)}},
    }
    assert header(read(given)) == ("", *models) + (("change",) if len(models) > 1 else ())
    assert all(len(row) == len(header(read(given))) for row in rows(read(given)))
    assert rows(read(given))[-1][1] == "50.0%"
    Page(render_html(read(given)))
    assert render_markdown(read(given)).startswith(f"# {given['task']}")
    print_summary(read(given), tmp_path)
    assert "from_pretrained" not in capsys.readouterr().out, "there is no model to load"


PARTS = {
    "warnings": "Warnings",
    "layers": "What was kept",
    "layer_error": "Error by layer",
    "recovery": "Recovery",
    "tasks": "Tasks",
    "samples": "Samples",
    "perplexity": "Perplexity, wikitext: 65,536",
    "macs_protocol": "MACs: one forward pass",
    "latency": "median of 5",
    "macs_by_module": "attention",
    "seconds": "12 min 34 s",
    "peak_memory_bytes": "17.00 GiB",
    "evaluation_bytes": "peak memory, evaluation",
    "weight_bytes": "12.55 GiB",
    "command": "python -m prunekit",
    "versions": "torch 2.13.0",
    "policy": "The policy gives proportions",
}
DRAWN = {
    "layers": ("layers", "ratio"),
    "layer_error": ("error",),
    "recovery": ("curve",),
    "tasks": ("tasks",),
    "policy": ("search",),
}


@pytest.mark.parametrize("key", PARTS)
def test_a_part_comes_and_goes_with_its_key(key, report, page, monkeypatch):
    words = PARTS[key]
    monkeypatch.setattr(
        Picture, "svg", lambda picture: f"<svg>{picture.name}</svg>"
    )  # drawing takes its time
    without = {name: value for name, value in report.items() if name != key}
    if key == "macs_by_module":
        without.pop("layers")
        assert f">{words}</th>" in page.replace(' class="w"', "")
        assert "MACs by module" not in render_html(read(without))
        return
    text = "".join(Page(page).text)
    assert words in text
    gone = render_html(read(without))
    assert words not in "".join(Page(gone).text)
    assert words in render_markdown(report)
    assert words not in render_markdown(read(without))
    for name in DRAWN.get(key, ()):
        assert name in pictures(report)
        assert name not in pictures(read(without))
        assert f"({name}.svg)" in render_markdown(report)
        assert f"({name}.svg)" not in render_markdown(read(without))


def test_the_least_report_is_rendered(tmp_path):
    least = {"task": "prune", "models": ["dense", "pruned"]}
    Page(render_html(read(least)))
    assert render_markdown(read(least)) == "# prune\n"
    assert pictures(read(least)) == {}
    print_summary(read(least), tmp_path)


def test_tables_of_the_page_and_of_markdown_hold_the_same_cells(report, page):
    inside, (outside, _) = Page(page).tables, markdown_tables(render_markdown(report))
    assert inside == outside
    assert [list(row) for row in rows(report)] == inside[0][1:]
    layers = next(table for table in inside if table[0][:2] == ["layer", "kind"])
    told = [(row[0], row[1], row[2], row[3]) for row in layers[1:]]
    assert told == [
        (str(layer["index"]), kind, f"{layer[kind]['kept']:,}", f"{layer[kind]['total']:,}")
        for layer in report["layers"]
        for kind in ("attention", "mlp")
    ]
    errors = next(table for table in inside if table[0] == ["layer", "pruned", "recovered"])
    for row, given in zip(errors[1:], report["layer_error"], strict=True):
        assert [float(cell) for cell in row[1:]] == pytest.approx(
            [given["pruned"], given["recovered"]], abs=5e-5
        )
    curve = next(table for table in inside if table[0][0] == "step")
    assert [int(row[0]) for row in curve[1:]] == [
        row["step"] for row in report["recovery"]["curve"]
    ]
    assert curve[0] == [
        "step",
        "tokens",
        "learning rate",
        "training loss",
        "validation loss",
        "perplexity, validation",
        "perplexity, wikitext",
    ]
    assert curve[1] == ["0", "0", "–", "–", "2.900", "18.20", "31.90"]


def test_the_page_loads_nothing_and_is_marked_up(page):
    parsed = Page(page)
    assert not parsed.all("script") and not parsed.all("link") and not parsed.all("iframe")
    for _, attrs in parsed.tags:
        assert not any(key.startswith("on") for key in attrs)
        for key in ("src", "href", "xlink:href"):
            assert attrs.get(key, "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import|@font-face", page)
    assert "default-src 'none'" in page and "prefers-color-scheme:dark" in page
    assert [name for name, _ in parsed.tags if re.fullmatch("h[1-6]", name)][:2] == ["h1", "h2"]
    assert len(parsed.all("caption")) == len(parsed.all("table")) > 5
    assert {attrs.get("scope") for attrs in parsed.all("th")} == {"row", "col"}
    for svg in parsed.all("svg"):
        assert svg["role"] == "img" and len(svg["aria-label"]) > 20
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 10
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | {
        a["href"][1:] for _, a in parsed.tags if "href" in a
    }
    assert used <= set(ids)


def colours_of(svg):
    """(property, colour) of every element that has a colour, by its attribute or its style."""
    for element in ElementTree.fromstring(svg).iter():
        style = element.get("style", "")
        declared = [part.split(": ", 1) for part in style.split("; ") if ": " in part]
        for name, value in [*declared, *element.attrib.items()]:
            if name in ("fill", "stroke") and value.startswith("#"):
                yield name, value, name in element.attrib


def test_every_svg_is_xml_with_colours_that_adapt(report, page, tmp_path):
    inside = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(inside) == len(pictures(report)) == 6
    write_pictures(pictures(report), tmp_path)
    files = [path.read_text() for path in sorted(tmp_path.glob("*.svg"))]
    assert len(files) == 6
    for text, sheet in [*((svg, page) for svg in inside), *((file, file) for file in files)]:
        assert {"viewBox", "role", "aria-label"} <= ElementTree.fromstring(text).attrib.keys()
        dark = sheet[sheet.index("@media (prefers-color-scheme:dark){[") :]
        found = set(colours_of(text))
        assert {("fill", LIGHT["pruned"], False), ("stroke", LIGHT["line"], False)} & found
        for name, colour, plain in found:
            selector = f'[{name}="{colour}"]' if plain else f'[style*="{name}: {colour}"]'
            own = next(key for key in LIGHT if LIGHT[key] == colour)
            rule = re.search(rf"{re.escape(selector)}[^{{}}]*{{(.*?)}}", dark)
            assert rule and rule[1] == f"{name}:{DARK[own]}!important", (name, colour)
        assert not re.search(r"rgb\(|hsl\(|=\"(black|white)\"", text)


def test_what_users_wrote_is_text(tmp_path, capsys):
    given = make(3)
    given["warnings"] = [NASTY]
    given["command"] = NASTY
    given["method"] = NASTY
    given["samples"] = [
        {"prompt": NASTY, "mode": NASTY, "dense": NASTY, "pruned": "", "recovered": NASTY}
    ]
    given["tasks"] = {
        NASTY: {"dense": {"value": 0.5}, "recovered": {"value": 0.25}, "metric": NASTY}
    }
    given["perplexity"] = {
        NASTY: {"dense": 1.0, "pruned": 2.0, "recovered": 3.0, "protocol": NASTY}
    }
    given["layers"].append({"index": None, NASTY: {"kept": 3, "total": 4}})
    given["policy"]["shares"][NASTY] = 1.0
    given["recovery"]["settings"] = {NASTY: NASTY}
    given["recovery"]["curve"][0]["perplexity"] = {NASTY: 3.0}
    page = render_html(read(given))
    parsed = Page(page)
    assert (
        not parsed.all("script")
        and not parsed.all("a")
        and "\x1b" not in page
        and "\x00" not in page
    )
    shown = NASTY.replace("\x1b", "�").replace("\x00", "�")
    assert "".join(parsed.text).count(shown) >= 10
    for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(text)
    text = render_markdown(read(given))
    tables, tokens = markdown_tables(text)
    html = "".join(token.content for token in tokens if token.type.startswith("html"))
    assert "script" not in html
    inline = [child for token in tokens for child in token.children or []]
    assert not [
        child
        for child in inline
        if child.type in ("html_inline", "link_open", "em_open", "code_inline")
    ]
    one_line = " ".join(shown.split())
    assert any(row[0] == f"perplexity, {one_line}" for row in tables[0])
    assert all(len(row) == len(table[0]) for table in tables for row in table)
    fences = [token.content for token in tokens if token.type == "fence"]
    assert fences.count(f"{shown}\n") == 4, "the command, the prompt and two answers, whole"
    print_summary(read(given), tmp_path)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "[e](http://f)" in printed


def test_the_same_report_gives_the_same_bytes(report, page, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "axes.facecolor": "red"}):
        assert render_html(Report.from_json(report.to_json())) == page, (
            "whatever the user's own style is"
        )
    write_pictures(pictures(report), tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_pictures(pictures(report), tmp_path)
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("layers", [1, 3, 32, 80])
@pytest.mark.parametrize("kinds", [("mlp",), ("attention", "mlp", "expert")])
def test_any_depth_and_any_kinds(layers, kinds):
    given = make(layers, recovered=False, kinds=kinds)
    for kind in kinds:
        given["layers"][layers // 2][kind]["kept"] = 0
    assert f"{kinds[0]} of layer {layers // 2}" in render_markdown(read(given))
    svg = pictures(read(given))["layers"].svg()
    for kind in kinds:
        assert re.search(rf">{kind}: [\d,]+ of [\d,]+ kept<", svg)
    assert svg.count("<path") >= 2 * layers * len(kinds)
    labels = re.findall(r">(\d+)</text>", svg)
    assert len(labels) <= 20 * len(kinds), "ticks are thinned"


def test_a_deep_model_s_page_stays_small():
    given = make(80, kinds=("attention", "mlp", "query_head", "expert"))
    given["recovery"]["curve"] = [
        {"step": i, "tokens": i, "loss": 2 + math.sin(i)} for i in range(5000)
    ]
    page = render_html(read(given))
    assert len(page.encode()) < 500_000
    curve = next(table for table in Page(page).tables if table[0][0] == "step")
    assert len(curve) <= 103 and curve[-1][0] == "4,999"


@pytest.mark.parametrize("many", [2, 40])
@pytest.mark.parametrize("layers", [0, 4])
def test_groups_outside_of_layers(many, layers):
    given = make(layers or 1, recovered=False)
    names = [f"features.{i}.conv" for i in range(many)]
    outside = {"index": None} | {
        name: {"kept": 60 - i, "total": 64} for i, name in enumerate(names)
    }
    given["layers"] = given["layers"][:layers] + [outside]
    given["policy"]["shares"] = dict.fromkeys(names, 1.0)
    svg = pictures(read(given))["layers"].svg()
    assert ("features.0.conv" in svg.split(">", 1)[1]) == (many == 2), "named where there is room"
    assert ">removed</text>" in pictures(read(given))["ratio"].svg()
    table = next(
        table
        for table in markdown_tables(render_markdown(read(given)))[0]
        if table[0][0] == "layer"
    )
    assert [row[1] for row in table if row[0] == "–"] == names


def test_a_search_is_shown_with_the_cuts_the_shares_and_the_rounds(report):
    text = render_markdown(report)
    assert "The search's winner leads every seed. 360 candidates were judged" in text
    assert "samples: 80 (database), 32 (fitness), 16 (held out)" in text
    tables = {table[0][0]: table for table in markdown_tables(text)[0]}
    assert tables["cut"][-1] == ["round 2 (taken)", "0.1700", "0.1800", "0.0000 ± 0.0020"]
    assert tables["group"][1] == [
        *("model.layers.0.attention", "10.0%", "20.0%", "30.0%", "40.0%", "0.0125"),
    ]
    assert tables["round"][2][:4] == ["2", "6.25%", "3.00 MiB", "180"]


def test_the_policy_s_curve_is_scaled_to_what_was_removed():
    """With names that don't match kinds, and one layer that a limit held back."""
    shares = {f"layers.{i}.{part}": float(i + 1) for i in range(5) for part in ("self_attn", "mlp")}
    given = {"policy": {"shares": shares}, "layers": []}
    for i in range(5):
        removed = 10 * (i + 1) if i < 4 else 45
        both = {kind: {"kept": 100 - removed, "total": 100} for kind in ("attention", "mlp")}
        given["layers"].append({"index": i, **both})
    found = units(read(given))
    assert [entry.planned for entry in found[::2]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert [entry.removed for entry in found[::2]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.45])


@pytest.mark.parametrize(
    ("values", "ticks"), [((1e-6, 1e-3, 2.0), {"1e-06", "1"}), ((0.02, 0.5, 0.9), {"0.03", "0.3"})]
)
def test_errors_over_decades_are_drawn_logarithmically(values, ticks):
    given = {"task": "prune", "models": ["dense", "pruned"]}
    given["layer_error"] = [{"index": i, "pruned": value} for i, value in enumerate(values)]
    picture = pictures(read(given))["error"]
    assert ticks <= set(re.findall(r">([^<]+)</text>", picture.svg()))
    assert re.search(rf"pruned at most {values[2]}0+, in layer 2", picture.label)
    given["layer_error"][0]["pruned"] = 0.0
    labels = re.findall(r">([\d.e-]+)</text>", pictures(read(given))["error"].svg())
    assert "0.0" in labels, "zero has no logarithm"


def test_a_curve_may_lack_any_of_its_figures():
    given = {"task": "recover", "models": ["pruned", "recovered"]}
    given["recovery"] = {"curve": [{"step": 0, "loss": None, "perplexity": {}}], "steps": 0}
    assert "curve" not in pictures(read(given))
    names = [f"a rather long name of corpus {i}" for i in range(6)]
    given["recovery"]["curve"] += [
        {"step": s, "perplexity": dict.fromkeys(names, 9.0) | {"x": None}} for s in (10, 20)
    ]
    picture = pictures(read(given))["curve"]
    assert "loss" not in picture.label and "perplexity on x" not in picture.label
    assert len(re.findall(r"a rather long name of corpus \d<", picture.svg())) == 6
    assert "–" in "".join(Page(render_html(read(given))).text)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_enough(colours):
    """WCAG AA: 4.5 for text, 3 for what a picture shows."""

    def contrast(a, b):
        high, low = sorted((luminance(colours[a]), luminance(colours[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(a, b) for a in ("ink", "soft") for b in ("paper", "track")) >= 4.5
    assert min(contrast(name, "paper") for name in SERIES) >= 3
    assert contrast("pruned", "track") >= 3, "the bar on its track"


def test_no_series_is_told_by_colour_alone():
    assert len(set(LIGHT.values())) == len(LIGHT), "a colour names its variable"
    for looks in (HATCHES, MARKERS, STYLES):
        assert len(set(looks)) == len(SERIES)


def test_the_terminal_shows_the_table_the_lines_that_load_and_the_files(report, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("report.json", "report.html"):
        (tmp_path / name).touch()
    print_summary(report, tmp_path)
    printed = capsys.readouterr().out
    assert f"model = prunekit.from_pretrained({str(tmp_path / 'model')!r})" in printed
    assert "perplexity, wikitext" in printed and "6,738,415,616" in printed and "± 2.0" in printed
    assert printed.rstrip().endswith(f"{tmp_path}: model/, report.json, report.html")
    assert "pruned: there was a pruned model. It ran." in printed
    assert max(map(len, printed.splitlines())) < 260
