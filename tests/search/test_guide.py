"""Guided steps: what a move is priced at, and which moves are made."""

import random

import pytest
import torch
from test_search import make_setting

from prunekit.compensation import Obs as Repair
from prunekit.importance import Obs
from prunekit.policies import Uniform
from prunekit.search import guide
from prunekit.search.bench import Bench, make_budget
from prunekit.search.fitness import Divergence
from prunekit.search.guide import Move, combine, probe
from prunekit.search.samples import split_samples
from prunekit.search.seeds import pack, price_between, price_levels


@pytest.fixture(scope="module")
def bench():
    """A bench of four layers, of whose 4 · 40 channels 40 must go, with two batches of four."""
    setting = make_setting(Obs(), Repair(), layers=4, removed=40)
    samples = split_samples(setting.batches, 0.25, 0.25, 64)
    with Bench.open(setting, samples, len(samples.fitness)) as opened:
        yield opened


@pytest.fixture(scope="module")
def arena(bench):
    seed = make_budget(bench.setting, Uniform().group_shares(bench.setting)).solve()
    return bench.open_round(seed, 0.25, 1.0)


def test_a_price_is_worse_than_measured_by_its_standard_error(arena, bench):
    """The differences of the samples are computed by runs of the whole model."""
    space, batches = arena.space, len(bench.judge.batches)
    own = space.nearest(make_budget(bench.setting, Uniform().group_shares(bench.setting)).solve())

    def means(candidate):
        arena.database.place(space.counts(candidate))
        return torch.cat([bench.judge.measure(b).means for b in range(batches)])

    moves = probe(arena, arena.raise_parent(own), (batches, batches))
    assert len(moves) == 2 * len(own)
    for move in moves:
        after = space.move(own, move.slot, move.levels)
        differences = means(after) - means(own)
        error = differences.std() / len(differences) ** 0.5
        assert error > 0.05 * differences.mean().abs()  # else it would not be seen in the price
        saved = space.cost(own) - space.cost(after)
        worse = (differences.mean() + error) / saved
        assert move.price == pytest.approx(float(worse), rel=1e-3)


def test_levels_are_priced_beside_those_of_the_other_slots(arena, bench):
    """By runs of the whole model, on one batch of two."""
    space = arena.space
    own = tuple(levels[1 + i % 2] for i, levels in enumerate(space.levels))

    def divergence(slot, step):
        arena.database.place(space.counts((*own[:slot], step, *own[slot + 1 :])))
        return bench.judge.measure(0).mean

    prices = price_levels(arena, arena.raise_parent(own), 1, 2)
    for slot, levels in enumerate(space.levels):
        assert prices[slot].keys() == {0, own[slot], levels[2], levels[-1]}
        for step, price in prices[slot].items():
            expected = divergence(slot, step) - divergence(slot, own[slot])
            assert price == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert prices[slot][0] < 0 < prices[slot][levels[-1]]


def test_other_candidates_than_those_known_come_by_their_divergence(arena, bench):
    """Of those that were judged on both batches and cost what is asked for."""
    space, batches = arena.space, len(bench.judge.batches)
    dense = (0,) * len(space.slots)
    alike = [(*dense[:i], space.levels[i][-1], *dense[i + 1 :]) for i in range(len(dense))]
    arena.measure(alike, batches)
    arena.measure([dense], batches)

    def divergence(candidate):
        arena.database.place(space.counts(candidate))
        judged = [bench.judge.measure(b) for b in range(batches)]
        return sum(judged, Divergence.none()).mean

    found = arena.find_others([alike[1]], batches)
    assert dense not in found and alike[1] not in found
    assert [c for c in found if c in alike] == sorted({*alike} - {alike[1]}, key=divergence)
    values = [divergence(candidate) for candidate in found]
    assert values == sorted(values)


def test_the_better_moves_are_priced_on_many_samples(arena, bench, monkeypatch):
    """A third of both kinds, rounded up, at the prices that all samples tell."""
    monkeypatch.setattr(guide, "_LEAST", 1)
    own = tuple(levels[1] for levels in arena.space.levels)
    parent, many = arena.raise_parent(own), len(bench.judge.batches)
    everything = probe(arena, parent, (many, many))
    hopeful = probe(arena, parent, (1, many))
    assert many > 1
    # The price of a level: those of the slots 0 and 1 rise least, those of 2 and 3 most.
    known = {i: {levels[0]: 0.0, levels[4]: 1.0 + i} for i, levels in enumerate(arena.space.levels)}
    guessed = probe(arena, parent, (1, many), known)
    assert {m.slot for m in guessed if m.levels == 1} == {0, 1}
    assert {m.slot for m in guessed if m.levels == -1} == {2, 3}
    for moves in (hopeful, guessed):
        assert all(move in everything for move in moves)
        for levels in (-1, 1):
            assert 2 * sum(move.levels == levels for move in moves) == len(own)


def test_a_knapsack_takes_levels_between_those_that_are_priced(arena):
    """Of 40 channels one slot gives 10 at least, and the slot with the lowest prices the others."""
    space = arena.space
    first, *_, last = space.levels
    prices = {i: {levels[0]: 0.0, levels[4]: 4.0 + i} for i, levels in enumerate(space.levels)}
    prices[3] = {last[1]: 0.0, last[4]: 1000.0}
    assert pack(space, prices) == (first[3], 0, 0, last[1])
    slot = space.slots[3]
    low, middle, high = (slot.removed[last[level]] for level in (1, 2, 4))
    expected = 1000 * (middle - low) / (high - low)
    assert price_between(slot, prices[3], last[2]) == pytest.approx(expected)
    assert price_between(slot, prices[3], last[4]) == 1000
    assert price_between(slot, prices[3], last[0]) is None


def test_moves_are_made_only_where_they_promise_to_win(arena):
    space = arena.space
    own = tuple(levels[1] for levels in space.levels)
    saving = [Move(slot=1, levels=1, price=2.0), Move(slot=2, levels=1, price=4.0)]
    for price, changed in ((3.0, {0, 1}), (1.0, set())):
        back = Move(slot=0, levels=-1, price=price)
        children = combine(space, own, [back, *saving], random.Random(0))
        found = {i for child in children for i in range(len(own)) if child[i] != own[i]}
        assert found == changed
