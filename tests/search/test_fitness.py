"""The judge against plain forward passes of the whole model in float64."""

import pytest
import torch
from conftest import example, tiny_llama, token_ids

from prunekit.calibration.store import Store
from prunekit.data.batches import make_batches
from prunekit.errors import ConfigError
from prunekit.graph import trace
from prunekit.search import fitness
from prunekit.search.fitness import Divergence, Judge


def plain_divergence(dense, model, ids, mask=None):
    """Σ p (log p − log q) at every position, by the definition; the mean over the positions."""
    given = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad():
        p = dense(input_ids=ids, **given).logits.log_softmax(-1)
        q = model(input_ids=ids, **given).logits.log_softmax(-1)
    values = (p.exp() * (p - q)).sum(-1)
    return float(values.mean() if mask is None else values[mask.bool()].mean())


def open_judge(model, batches, trailed=None, store=None, rows=2):
    graph = trace(tiny_llama(kv_heads=2), example())
    groups = [group for group in graph.groups if group.kind == "mlp"]
    made = make_batches(model, batches, rows, torch.device("cpu"))
    store = store or Store()
    return Judge(model, groups, made, store, len(made) if trailed is None else trailed)


def total(judge, first=0, states=None):
    parts = [judge.measure(b, first, states) for b in range(len(judge.batches))]
    return sum(parts, Divergence.none()).mean


@pytest.mark.parametrize("kept", [1 << 30, 97 * 4 * 18, 0])
def test_fitness_is_the_divergence_of_the_whole_model(kept, monkeypatch):
    """Also where dense probabilities of no batch or of one are kept, in chunks of a few tokens."""
    monkeypatch.setattr(fitness, "_KEPT_BYTES", kept)
    monkeypatch.setattr(fitness, "_CHUNK_ELEMENTS", {"cpu": 97 * 4})
    dense, model = tiny_llama(kv_heads=2).double(), tiny_llama(kv_heads=2).double()
    ids = token_ids(5, 9)
    judge = open_judge(model, ids)
    assert abs(total(judge)) < 1e-12
    model.model.layers[1].mlp.down_proj.weight.data[:, :11] = 0
    expected = plain_divergence(dense, model, ids)
    assert expected > 1e-5
    assert total(judge) == pytest.approx(expected, rel=1e-9)
    assert total(judge, first=1) == pytest.approx(expected, rel=1e-9)


def test_a_child_is_run_from_its_first_changed_layer_on():
    dense, model = tiny_llama(kv_heads=2).double(), tiny_llama(kv_heads=2).double()
    ids = token_ids(4, 9)
    judge = open_judge(model, ids)
    model.model.layers[0].mlp.down_proj.weight.data[:, 3:9] = 0
    trail = judge.trail(0, judge.states)
    model.model.layers[2].self_attn.o_proj.weight.data[:, :6] = 0
    before = judge.tokens_run
    assert total(judge, 2, trail) == pytest.approx(plain_divergence(dense, model, ids), rel=1e-9)
    assert judge.tokens_run - before == pytest.approx(ids.numel() / 3)


@pytest.mark.parametrize("kept", [1 << 30, 0])
def test_batches_that_are_not_trailed_are_run_as_a_whole(kept, monkeypatch):
    """No layer runs on them for a trail, and nothing is kept of them behind the first layer."""
    monkeypatch.setattr(fitness, "_KEPT_BYTES", kept)
    dense, model = tiny_llama(kv_heads=2).double(), tiny_llama(kv_heads=2).double()
    ids = token_ids(5, 9)
    judge = open_judge(model, ids, trailed=1)
    model.model.layers[0].mlp.down_proj.weight.data[:, 3:9] = 0
    assert total(judge) == pytest.approx(plain_divergence(dense, model, ids), rel=1e-9)
    before = judge.tokens_run
    trail = judge.trail(0, judge.states)
    assert judge.tokens_run - before == 2 * 9  # one of three batches
    assert [len(states) for states in (*judge.states, *trail)] == [3, 1, 1] * 2
    expected = plain_divergence(dense, model, ids[:2])
    assert judge.measure(0, 1, trail).mean == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kept", [1 << 30, 0])
def test_nothing_lies_outside_of_the_budget(kept, monkeypatch):
    """States that nobody holds any more give their room back."""
    monkeypatch.setattr(fitness, "_KEPT_BYTES", kept)
    dense, model = tiny_llama(kv_heads=2).double(), tiny_llama(kv_heads=2).double()
    ids, store = token_ids(4, 9), Store(budget=0)
    judge = open_judge(model, ids, store=store)
    of_states = 8 * 4 * 9 * 48
    head = 4 * 9 * 8 * dense.config.vocab_size if kept else of_states
    assert store.used == {"device": 0, "host": 0, "file": 3 * of_states + head}
    model.model.layers[0].mlp.down_proj.weight.data[:, 3:9] = 0
    trail = judge.trail(0, judge.states)
    assert store.used["file"] == 5 * of_states + head
    assert total(judge, 2, trail) == pytest.approx(plain_divergence(dense, model, ids), rel=1e-9)
    del trail
    assert store.used["file"] == 3 * of_states + head
    assert store.peak["device"] == 0


@pytest.mark.parametrize("kept", [1 << 30, 0])
def test_logits_of_a_long_sample_are_computed_in_parts(kept, monkeypatch):
    monkeypatch.setattr(fitness, "_KEPT_BYTES", kept)
    monkeypatch.setattr(fitness, "CHUNK", 4)
    dense, model = tiny_llama(kv_heads=2).double(), tiny_llama(kv_heads=2).double()
    ids, seen = token_ids(2, 9), []
    model.lm_head.register_forward_hook(lambda head, x, logits: seen.append(logits.shape[:2]))
    judge = open_judge(model, ids, rows=1)
    model.model.layers[1].mlp.down_proj.weight.data[:, :11] = 0
    measured, expected = total(judge), plain_divergence(dense, model, ids)
    assert measured == pytest.approx(expected, rel=1e-9)
    assert {tuple(shape) for shape in seen[:-1]} == {(1, 4), (1, 1)}


def test_padding_does_not_count():
    dense, model = tiny_llama(kv_heads=2).double(), tiny_llama(kv_heads=2).double()
    ids, mask = token_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask, "use_cache": False}]
    judge = open_judge(model, batches)
    model.model.layers[0].mlp.down_proj.weight.data[:, :7] = 0
    expected = plain_divergence(dense, model, ids, mask)
    assert total(judge) == pytest.approx(expected, rel=1e-9)


def test_samples_are_told_apart():
    one = Divergence(sums=torch.tensor([2.0, 6.0]), counts=torch.tensor([1.0, 2.0]))
    two = one + Divergence(sums=torch.tensor([4.0]), counts=torch.tensor([1.0]))
    assert two.mean == 3
    assert two.means.tolist() == [2, 3, 4]


def test_groups_outside_of_layers_are_refused():
    model = tiny_llama(kv_heads=2)
    graph = trace(model, example())
    groups = [group for group in graph.groups if group.kind == "channel"]
    with pytest.raises(ConfigError, match="one list of layers"):
        Judge(model, groups, make_batches(model, token_ids(), 2, torch.device("cpu")), Store(), 0)
