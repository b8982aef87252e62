"""Multiply-adds against a closed formula, speed that takes turns, layers' errors, samples, results
by content.
"""

import copy
import json

import pytest
import torch
from conftest import tiny_llama, token_ids
from families import build, values_of

import prunekit
from prunekit.allocation.costs.flops import flops_cost
from prunekit.evaluation import cache as caches
from prunekit.evaluation import speed as speeds
from prunekit.evaluation.cache import Cache, model_key
from prunekit.evaluation.cost import count_macs, measure_size, odd_widths
from prunekit.evaluation.generation import PAPERS, Drawing, continue_prompt, expand_prompts
from prunekit.evaluation.outputs import layer_outputs, relative_errors
from prunekit.evaluation.speed import measure_speed
from prunekit.plan import PruningPlan

TOKENS = 11


def pruned_llama():
    model = tiny_llama(kv_heads=4)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    names = {f"{group.layer}.{group.kind}": group.name for group in graph.groups}
    removed = {names["0.attention"]: [1], names["1.mlp"]: [0, 3, 5], names["2.mlp"]: [7]}
    prunekit.apply_plan(model, graph, PruningPlan(removed))
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_macs_of_a_llama_by_its_formula(attention):
    model = pruned_llama()
    model.set_attn_implementation(attention)
    heads, channels, hidden, width, vocabulary = (6, 8, 8), (40, 37, 39), 48, 6, 97
    kv = (3, 4, 4)
    projections = sum(
        TOKENS * hidden * width * (2 * q + 2 * k) for q, k in zip(heads, kv, strict=True)
    )
    products = sum(2 * TOKENS * TOKENS * q * width for q in heads)
    expected = {
        "model.layers.*.self_attn": projections + products,
        "model.layers.*.mlp": sum(3 * TOKENS * hidden * c for c in channels),
        "lm_head": TOKENS * hidden * vocabulary,
    }
    counts = count_macs(model, TOKENS)
    assert {name: n for name, n in counts.by_module.items() if n > 1000} == expected
    rotary = TOKENS * width // 2  # frequencies × positions
    assert counts.total - sum(expected.values()) in (0, rotary)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "mixtral", "qwen2_moe", "phi3"])
def test_macs_are_those_of_the_traced_axes(family):
    model = build(family, values_of(family), "sdpa")
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    counted = flops_cost(model, graph, {"input_ids": token_ids(1, TOKENS), "use_cache": False})({})
    counts = count_macs(model, TOKENS)
    assert 2 * counts.total == counted
    assert 2 * sum(counts.by_module.values()) == pytest.approx(counted, rel=0.01)


def test_models_take_turns(monkeypatch):
    turns, clock = [], iter(range(1000))

    def once(model, ids, new):
        turns.append((model, tuple(ids.shape), new))
        return float(next(clock)), 2.0

    monkeypatch.setattr(speeds, "_time_passes", once)
    one, two = tiny_llama(), tiny_llama(layers=1)
    speed = measure_speed({"dense": one, "pruned": two}, batch=3, prompt=7, new=4, repeats=3)
    assert [model is one for model, *_ in turns] == [True, False] * 4
    assert turns[0][1:] == ((3, 7), 4)
    assert speed.prefill_tokens_per_second == {
        "dense": 21 / 4,
        "pruned": 21 / 5,
    }  # the first turn warms up
    assert speed.decode_tokens_per_second["dense"] == 6
    assert "median of 3" in speed.protocol


def test_speed_and_peak_are_measured():
    model = tiny_llama()
    speed = measure_speed({"dense": model}, prompt=16, new=4, repeats=2)
    assert speed.prefill_tokens_per_second["dense"] > speed.decode_tokens_per_second["dense"] > 1
    assert speed.peak_bytes["dense"] >= measure_size(model).weight_bytes


def test_odd_widths_are_those_that_pruning_made():
    dense, pruned = tiny_llama(), pruned_llama()
    new = odd_widths(pruned) - odd_widths(dense)
    names = [f"layers.{i}.mlp.{kind}" for i in (1, 2) for kind in ("up", "gate", "down")]
    names += [f"layers.0.self_attn.{kind}" for kind in "qkvo"]
    assert new == {f"model.{name}_proj.weight" for name in names}


def test_errors_of_layers_are_those_of_hidden_states():
    dense, pruned, windows = tiny_llama(), pruned_llama(), token_ids(3, 8)
    with torch.no_grad():
        a, b = (
            m.model(windows, output_hidden_states=True).hidden_states[1:3] for m in (dense, pruned)
        )
    expected = [
        ((x - y).double().square().sum() / x.double().square().sum()).item()
        for x, y in zip(a, b, strict=True)
    ]
    errors = relative_errors(layer_outputs(dense, windows), layer_outputs(pruned, windows))
    assert errors[:2] == pytest.approx(expected, rel=1e-4)
    assert len(errors) == 3
    assert (
        relative_errors(layer_outputs(dense, windows), layer_outputs(tiny_llama(layers=2), windows))
        == []
    )


class Tokenizer:
    pad_token_id, eos_token_id = None, 1

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(letter) % 97 for letter in text]])}

    def decode(self, ids, **_):
        return " ".join(map(str, ids.tolist()))


def test_samples_are_the_seeds():
    model, before = tiny_llama(), torch.get_rng_state()
    drawn = [
        continue_prompt(model, Tokenizer(), "abc", 8, drawing=Drawing(temperature=1.5, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = continue_prompt(model, Tokenizer(), "abc", 4).split()
    ids = torch.tensor([[int(i) for i in greedy[:3]]])
    for token in greedy[3:]:
        with torch.no_grad():
            assert int(token) == model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, torch.tensor([[int(token)]])], 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert expand_prompts(["a", "papers"]) == ["a", *PAPERS]


def test_results_are_kept_by_content(tmp_path):
    model = tiny_llama()
    keys = {model_key(model)}
    assert model_key(copy.deepcopy(model)) in keys
    for change in (
        lambda m: m.lm_head.weight.data[0, 0].add_(1e-3),
        lambda m: m.set_attn_implementation("eager"),
        lambda m: setattr(m.config, "rope_theta", 5.0),
        lambda m: m.model.rotary_emb.inv_freq.mul_(2),
        lambda m: m.double(),
    ):
        other = tiny_llama()
        change(other)
        keys.add(model_key(other))
    assert len(keys) == 6
    assert model_key(model.to("meta")) is None
    calls = []
    for key, protocol in (("a", "p"), ("a", "p"), ("b", "p"), ("a", "q"), (None, "p"), (None, "p")):
        Cache(tmp_path, key).remember(
            protocol, lambda k=key, p=protocol: calls.append((k, p)) or {"x": 1.5}
        )
    assert calls == [("a", "p"), ("b", "p"), ("a", "q"), (None, "p"), (None, "p")]
    for file in tmp_path.iterdir():
        assert json.loads(file.read_text())["value"] == {"x": 1.5}
        entry = json.loads(file.read_text())
        file.write_text(
            file.read_text()[:-9]
            if entry["key"] == "q"
            else json.dumps(entry | {"value": {"x": 2.5}})
        )
    assert Cache(tmp_path, "a").get("p") is None, "damaged: measured again"
    assert Cache(tmp_path, "a").get("q") is None
    (tmp_path / "file").write_text("")
    assert Cache(tmp_path / "file", "a").remember("p", lambda: 3) == 3, (
        "a folder that can't be is no error"
    )
    assert Cache(tmp_path, "a").remember("p", lambda: 7) == 7 == Cache(tmp_path, "a").get("p")


@pytest.mark.parametrize("package", ["evaluation", "data", "model", "runtime"])
def test_figures_of_other_code_are_not_taken(package, monkeypatch, tmp_path):
    file = tmp_path / package / "deep" / "code.py"
    file.parent.mkdir(parents=True)
    file.write_text("one = 1")
    monkeypatch.setattr(caches, "__file__", str(tmp_path / "evaluation" / "cache.py"))
    cache = Cache(tmp_path / "kept", "model")
    cache.put("key", 3)
    assert cache.get("key") == 3
    file.write_text("one = 2")
    assert cache.get("key") is None
