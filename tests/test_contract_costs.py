"""The contract of costs: a module, a YAML in conf/cost, and a row in COUNT.

COUNT says how a cost is counted on a model that was really cut.
"""

import copy
import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import example, tiny_llama, token_ids
from contracts import COSTS, run
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prunekit
from prunekit import config as cfg
from prunekit.allocation.costs import Cost, CostModel, CostSetting
from prunekit.errors import ConfigError

QUICK = {"latency": ["cost.widths=2", "cost.repeats=1", "target.tokens=16"]}


def count_flops(model):
    inputs = {"input_ids": token_ids(1, 64), "use_cache": False}
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    return counter.get_total_flops()


COUNT = {
    "parameters": lambda model: sum(p.numel() for p in model.parameters()),
    "bytes": lambda model: sum(p.numel() * p.element_size() for p in model.parameters()),
    "flops": count_flops,
    "latency": None,  # measured: seconds of a cut model differ from call to call
}


def build(name):
    config = cfg.check(cfg.compose([f"cost={name}", *QUICK.get(name, ())]))
    return cfg.build(config.cost, "cost")


def measure(backend, model):
    graph = prunekit.trace(model, example())
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    batches = [{"input_ids": token_ids(4, 8), "use_cache": False}]
    setting = CostSetting(model=model, graph=graph, groups=groups, batches=batches)
    return graph, groups, backend.measure(setting)


def test_every_cost_has_a_row():
    assert COUNT.keys() == set(COSTS)


@pytest.mark.parametrize("name", COSTS)
def test_a_cost_is_that_of_the_cut_model_never_rises_and_leaves_the_model_alone(name):
    backend, model = build(name), tiny_llama(kv_heads=2, layers=2)
    assert isinstance(backend, CostModel)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    graph, groups, cost = measure(backend, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert cost.name == backend.name == name
    rng = random.Random(0)
    for _ in range(3):
        removed = {
            g.name: sorted(rng.sample(range(g.num_units), rng.randrange(g.num_units)))
            for g in groups
        }
        counts = {group: float(len(units)) for group, units in removed.items()}
        path = [cost({g: share / 8 * n for g, n in counts.items()}) for share in range(9)]
        assert all(after <= before for before, after in zip(path, path[1:], strict=False))
        assert 0 < path[-1] <= path[0]
        assert path[-1] < path[0] or COUNT[name] is None
        cut = copy.deepcopy(model)
        prunekit.apply_plan(cut, graph, prunekit.PruningPlan(removed))
        if COUNT[name] is not None:
            assert cost({}) == COUNT[name](model)
            assert cost(counts) == COUNT[name](cut)
        if cost.remeasure is not None:
            assert cost.remeasure(cut) > 0


@pytest.mark.parametrize("name", COSTS)
def test_whole_layers_are_counted_or_refused(name):
    chosen = ["importance=alternate", "policy=uniform", f"cost={name}", *QUICK.get(name, ())]
    if not build(name).counts_layers:
        with pytest.raises(ConfigError, match=f"cost={name}: it can't be told for whole layers"):
            run(chosen, "layer", 0.3)
        return
    model, result = run(chosen, "layer", 0.4)
    graph = prunekit.trace(tiny_llama(kv_heads=2, layers=4), example())
    setting = CostSetting(
        model=tiny_llama(kv_heads=2, layers=4), graph=graph, groups=(), batches=()
    )
    cost = build(name).measure(setting)
    assert len(model.model.layers) == 2
    assert cost({"layers": len(result.plan.removed["layers"])}) == pytest.approx(COUNT[name](model))


@pytest.mark.parametrize("name", ["bytes", "flops"])
def test_a_ratio_is_a_share_of_what_the_cost_counts(name):
    model, result = run(["importance=magnitude", "policy=uniform", f"cost={name}"], ratio=0.08)
    target = result.report["target"]
    assert target["measure"] == name
    assert target["limit"] == pytest.approx(0.92 * target["dense"])
    assert result.report["ratio"]["target"] is None
    assert target["achieved"] == COUNT[name](model)
    assert target["achieved"] == pytest.approx(target["limit"], rel=0.01)


class Wide(nn.Module):
    """A feed-forward layer that takes long enough to be timed."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 8192), nn.Linear(8192, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_a_ratio_of_the_seconds():
    model = Wide()
    chosen = ["importance=magnitude", "policy=uniform", "cost=latency", "cost.widths=3"]
    calibration = [{"x": torch.randn(256, 64)}]
    result = prunekit.prune(
        model, ratio=0.3, method="magnitude", calibration=calibration, overrides=chosen
    )
    target = result.report["target"]
    assert target["achieved"] == pytest.approx(0.7 * target["dense"], rel=0.05)
    assert target["measured"] > 0
    assert model.up.out_features < 8192


@pytest.mark.parametrize(
    ("target", "measure"),
    [("parameters=40000", "parameters"), ("bytes=160000", "bytes"), ("flops=6e6", "flops")],
)
def test_targets(target, measure):
    model, result = run([f"target.{target}", "importance=magnitude", "policy=log_increase"])
    found = result.report["target"]
    assert found["measure"] == measure
    assert found["achieved"] == pytest.approx(found["limit"], rel=0.01)
    if measure != "flops":
        assert found["achieved"] == sum(p.numel() for p in model.parameters()) * (
            4 if measure == "bytes" else 1
        )


def test_a_limit_in_the_units_of_the_cost():
    chosen = ["importance=magnitude", "policy=uniform"]
    limit, plain = (
        run([*chosen, "cost=flops", "target.limit=6e6"])[1],
        run([*chosen, "target.flops=6e6"])[1],
    )
    assert limit.plan == plain.plan
    assert limit.report["target"] == plain.report["target"]
    fewer = run([*chosen, "cost=flops", "cost.tokens=32", "target.flops=3e6"])[1]
    assert fewer.report["target"]["dense"] < plain.report["target"]["dense"] * 0.6


@dataclass(frozen=True, kw_only=True)
class CacheBytes(CostModel):
    """A user's own: bytes of the keys and values that a token leaves in the cache."""

    name: ClassVar[str] = "cache"
    itemsize: int = 2

    def measure(self, setting: CostSetting) -> Cost:
        heads = [group for group in setting.graph.groups if group.kind == "attention"]
        each = 2 * 6 * self.itemsize  # a key and a value of a head_dim of 6
        return Cost(
            name=self.name,
            unit="bytes a token",
            tables={g.name: tuple(float(each * n) for n in range(g.num_units + 1)) for g in heads},
        )


@pytest.mark.parametrize("option", [[], ["target.limit=96"]])
def test_a_cost_of_ones_own(option):
    own = f"cost._target_={__name__}.CacheBytes"
    chosen = ["importance=magnitude", "policy=uniform", own, *option]
    model, result = run(chosen, "attention", 0.5)
    assert result.report["target"] == {
        "measure": "cache",
        "limit": 96,
        "dense": 192,
        "achieved": 96,
    }
    kept = [layer.self_attn.k_proj.out_features // 6 for layer in model.model.layers]
    assert kept == [1, 1, 1, 1]


def test_mistakes():
    for chosen, match in (
        (["cost=flops", "cost.tokens=1"], r"cost.tokens: expected a whole number ≥ 2, got 1"),
        (["cost=latency", "cost.widths=1"], r"cost.widths: expected a whole number ≥ 2, got 1"),
        (["cost=bytes", "target.flops=1e6"], r"target.flops: expected cost=flops, or a target"),
        (["target.limit=9", "target.flops=1e6"], r"target: expected one of .*flops and limit"),
        (["target.limit=-1"], r"target.limit: expected a number > 0, got -1"),
        (
            ["cost=flops", "target.limit=1e9"],
            r"target.limit: expected less than the dense .* flops",
        ),
        (["cost=flop"], "cost: unknown choice 'flop': did you mean flops"),
    ):
        with pytest.raises(prunekit.PrunekitError, match=match) as caught:
            run(["importance=magnitude", *chosen])
        assert "\n" not in str(caught.value)
