"""A cut keeps slices, and not the uncut weights, until it is known to be right."""

import copy
import itertools

import pytest
import torch
from conftest import example, tiny_llama
from torch import nn

from prunekit.graph import trace
from prunekit.surgery.cut import cut_model
from prunekit.surgery.slices import cut_tensor, join_slices


def peak_of(action, model):
    """The most bytes that `action` takes at once beyond a model, which is a copy made here."""
    with torch.profiler.profile(profile_memory=True) as profile:
        own = copy.deepcopy(model)  # what is freed counts only if its making was seen
        with torch.profiler.record_function("begin"):
            pass
        action(own)
    events = profile.profiler.kineto_results.events()
    (begin,) = [e.start_ns() for e in events if e.name() == "begin"]
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    before = sum(nbytes for at, nbytes in memory if at < begin)
    return max(itertools.accumulate(nbytes for _, nbytes in memory)) - before


def units_of(model, kinds=("attention", "mlp")):
    graph = trace(model, example())
    removed = {g.name: [0, 2] for g in graph.groups if g.kind in kinds and g.layer is not None}
    return graph, removed


def test_slices_put_a_tensor_together_again():
    tensor = torch.randn(7, 5, 6, dtype=torch.bfloat16)
    removed = {2: torch.tensor([5, 0, 5]), 0: torch.tensor([3])}
    cut, slices = cut_tensor(tensor, removed)
    assert torch.equal(cut, tensor[[0, 1, 2, 4, 5, 6]][:, :, [1, 2, 3, 4]])
    assert cut.numel() + sum(part.values.numel() for part in slices) == tensor.numel()
    assert torch.equal(join_slices(cut, slices), tensor)


def test_a_cut_holds_one_uncut_weight_at_a_time():
    """Old and new weights together would take what all the new ones take."""
    model = tiny_llama(layers=6)
    graph, removed = units_of(model)
    with torch.no_grad():
        peak = peak_of(lambda own: cut_model(own, graph, removed), model)
    names = {member.parameter for name in removed for member in graph[name].members}
    sizes = [model.get_parameter(name).nbytes for name in names]
    assert peak < 4 * max(sizes) < sum(sizes) / 4


@pytest.mark.parametrize("held", [False, True])
def test_undoing_leaves_nothing_to_tell(held):
    model = tiny_llama(tied=True)
    model.lm_head.weight.note = "kept"
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    graph, removed = units_of(model, ("attention", "mlp", "channel"))
    (channel,) = [group.name for group in graph.groups if group.kind == "channel"]
    removed[channel] = [1, 47]
    before = copy.deepcopy(model)
    holder = list(model.parameters()) if held else []
    cut_model(model, graph, removed).undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.note == "kept"
    for (name, now), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, was) and now.stride() == was.stride(), name
        assert type(now) is nn.Parameter and now.requires_grad == was.requires_grad
    for now, old in zip(model.parameters(), holder, strict=bool(held)):
        assert now is old


def test_a_weight_with_more_than_numbers_is_kept_itself():
    """A gradient, a hook, memory that others share: none of it is in slices."""
    model = tiny_llama()
    graph, removed = units_of(model)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.grad = torch.ones_like(mlp.up_proj.weight)
    seen = []
    mlp.gate_proj.weight.register_hook(seen.append)
    whole = torch.randn(2, *mlp.down_proj.weight.shape)
    mlp.down_proj.weight = nn.Parameter(whole[1])
    cut_model(model, graph, removed).undo()
    assert torch.equal(mlp.up_proj.weight.grad, torch.ones_like(mlp.up_proj.weight))
    assert mlp.down_proj.weight.data_ptr() == whole[1].data_ptr()
    mlp.gate_proj.weight.sum().backward()
    assert len(seen) == 1
