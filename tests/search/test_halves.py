"""Judging in bfloat16: when it is done, and that it tells candidates apart as float32 does."""

import pytest
import torch
from conftest import tiny_llama, token_ids
from test_fitness import open_judge, total

from prunekit.search import halves
from prunekit.search.halves import judges_in_halves


def rounded_llama():
    """A float32 model whose weights are values of bfloat16."""
    model = tiny_llama(kv_heads=2)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture
def multiplies(monkeypatch):
    """Let the CPU be one that multiplies bfloat16 by itself, or not."""

    def say(answer):
        monkeypatch.setattr(halves, "_multiplies_bfloat16", lambda: answer)

    return say


def test_halves_are_for_weights_that_were_stored_in_them(multiplies):
    multiplies(True)
    model = rounded_llama()
    assert judges_in_halves(model)
    assert not judges_in_halves(rounded_llama().bfloat16())  # they compute in it already
    assert not judges_in_halves(rounded_llama().double())
    multiplies(False)
    assert not judges_in_halves(model)
    multiplies(True)
    model.model.norm.weight.data[0] = 1 + 2**-12
    assert not judges_in_halves(model)


def test_halves_tell_what_float32_tells(multiplies):
    ids = token_ids(6, 16)
    values = []
    for answer in (False, True):
        multiplies(answer)
        model = rounded_llama()
        # Larger logits, so that a cut is worth more than what bfloat16 rounds away.
        model.lm_head.weight.data *= 32
        judge = open_judge(model, ids)
        model.model.layers[1].mlp.down_proj.weight.data[:] = 0
        values.append(total(judge))
        assert {kept.get().dtype for kept in judge.states[1]} == {torch.float32}
    wide, half = values
    assert half != wide
    assert half == pytest.approx(wide, rel=0.1)
