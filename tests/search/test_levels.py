"""Levels follow the slots' own steps; samples of the parts share no text."""

import random

import pytest
import torch
from conftest import example, tiny_llama, token_ids

from prunekit.allocation.budget import Budget
from prunekit.allocation.costs.weights import weights_cost
from prunekit.allocation.scope import Scope
from prunekit.allocation.slots import Demands, make_slots
from prunekit.errors import DataError
from prunekit.graph import trace
from prunekit.search.evolution import fit, mutate
from prunekit.search.levels import Space, spread_levels
from prunekit.search.samples import split_samples


def make_space(step=0.25, width_multiple=1, ratio=0.15, layers=3, min_units=None):
    graph = trace(tiny_llama(kv_heads=2, layers=layers), example())
    groups = [group for group in graph.groups if group.kind in ("attention", "mlp")]
    cost = weights_cost(graph)
    demands = Demands(
        multiples={g.name: width_multiple for g in groups if g.kind == "mlp"},
        floors={} if min_units is None else {g.name: min_units for g in groups},
    )
    shares = dict.fromkeys((group.name for group in groups), 1.0)
    slots = make_slots(Scope(min_units=min_units), groups, shares, demands)
    budget = Budget(slots=slots, cost=cost, limit=cost({}) * (1 - ratio))
    return Space(budget=budget, levels=tuple(spread_levels(slot, step) for slot in slots))


def test_levels_are_steps_of_the_slots():
    space = make_space(step=0.25, width_multiple=8)
    attention, ffn = space.slots[0], space.slots[1]
    assert [attention.removed[step] for step in space.levels[0]] == [0, 1]  # one of two heads stays
    # 40 channels, those that stay a multiple of 8: a quarter is 10, the nearest steps are 8, 16, …
    assert [ffn.removed[step] for step in space.levels[1]] == [0, 8, 16, 32]
    around = spread_levels(ffn, 0.1, centre=2, reach=0.25)
    assert [ffn.removed[step] for step in around] == [0, 8, 16, 24]
    counts = space.counts((1, *[2] * (len(space.slots) - 1)))
    assert counts[ffn.name] == 16


@pytest.mark.parametrize("step", [0.25, 0.1])
def test_children_meet_the_limit_to_half_a_level(step):
    space, rng = make_space(step), random.Random(0)
    parent = fit(space, (0,) * len(space.slots), set(), rng)
    children = {mutate(space, parent, rng) for _ in range(40)}
    assert len(children) > 10
    for child in {parent, *children}:
        assert all(s in levels for s, levels in zip(child, space.levels, strict=True))
        assert abs(space.cost(child) - space.budget.limit) <= space.tolerance


def test_a_dear_level_is_made_up_for_by_cheap_ones():
    """All FFNs are gone, and no head: a head less overshoots, until channels come back."""
    space = make_space(step=0.125, ratio=0.3832, layers=2, min_units=0)
    ends = [levels[-1] for levels in space.levels]
    start = tuple(0 if end == 2 else end for end in ends)
    found = fit(space, start, set(), random.Random(0))
    assert space.cost(start) - space.budget.limit > 2 * space.tolerance
    assert abs(space.cost(found) - space.budget.limit) <= space.tolerance


def test_the_parts_of_the_samples_share_no_text_and_lose_none():
    stream = token_ids(1, 400)[0]
    apart = token_ids(9, 64, seed=1)
    overlapping = torch.stack([stream[i * 20 : i * 20 + 64] for i in range(3)])  # 44 tokens shared
    ids = torch.cat([apart[:6], overlapping, apart[6:]])
    parts = split_samples([{"input_ids": ids[:7]}, {"input_ids": ids[7:]}], 0.25, 0.125, 128)
    rows = {
        name: [tuple(row.tolist()) for batch in getattr(parts, name) for row in batch["input_ids"]]
        for name in ("database", "fitness", "held_out")
    }
    everyone = [row for own in rows.values() for row in own]
    assert sorted(everyone) == sorted(tuple(row.tolist()) for row in ids)
    together = {tuple(row.tolist()) for row in overlapping}
    assert sum(bool(together & set(own)) for own in rows.values()) == 1
    assert len(rows["held_out"]) >= 2
    assert len(rows["fitness"]) >= 3
    assert max(batch["input_ids"].numel() for batch in parts.fitness) <= 128
    with pytest.raises(DataError, match="three parts"):
        split_samples([{"input_ids": overlapping}], 0.25, 0.125, 128)
