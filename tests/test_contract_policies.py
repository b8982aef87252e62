"""The contract of policies. A new policy is a module, a YAML in conf/policy, and so a row here."""

from dataclasses import dataclass

import pytest
import torch
from conftest import example, tiny_llama, token_ids
from contracts import POLICIES, VALUES, run
from torch import nn

from prunekit import config as cfg
from prunekit.allocation.budget import Budget
from prunekit.allocation.costs.weights import weights_cost
from prunekit.allocation.scope import Scope
from prunekit.allocation.slots import make_slots
from prunekit.graph import trace
from prunekit.importance import Magnitude
from prunekit.policies import DepthPolicy, Policy, Setting

RATIO = 0.08


@pytest.mark.parametrize("name", POLICIES)
def test_shares_meet_the_limit_repeat_and_leave_the_model_alone(name):
    policy = cfg.build(
        cfg.check(cfg.compose([f"policy={name}", *VALUES.get(name, ())])).policy, "policy"
    )
    assert isinstance(policy, Policy)
    model = tiny_llama(kv_heads=2, layers=4)
    graph = trace(model, example())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    groups = [group for group in graph.groups if group.kind in ("attention", "mlp")]
    cost = weights_cost(graph)
    limit = cost({}) * (1 - RATIO)

    def shares_of(model, batches):
        setting = Setting(
            model=model,
            graph=graph,
            groups=groups,
            batches=batches,
            importance=Magnitude(),
            cost=cost,
            limit=limit,
        )
        return policy.group_shares(setting)

    batches = [{"input_ids": token_ids(3, 7), "use_cache": False}]
    shares = shares_of(model, batches)
    assert shares.keys() == {group.name for group in groups}
    assert all(0 <= share < float("inf") for share in shares.values())
    assert any(shares.values())
    assert shares_of(model, batches) == shares
    if not policy.measures:  # so that a streamed model, without weights, can be given
        assert shares_of(nn.Identity(), []) == shares
    budget = Budget(slots=make_slots(Scope(), groups, shares), cost=cost, limit=limit)
    counts = budget.solve()
    assert abs(cost(counts) - limit) <= min(budget.step_costs.values()) / 2 + 1e-6
    assert all(counts[group] == 0 for group, share in shares.items() if not share)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@dataclass(frozen=True, kw_only=True)
class Odd(DepthPolicy):
    """A user's own: layers of odd numbers lose `more` times as much."""

    more: float = 3.0

    def shares(self, depth):
        return [self.more if i % 2 else 1.0 for i in range(depth)]


def test_a_policy_of_ones_own():
    target = f"policy._target_={__name__}.Odd"
    _, result = run(["importance=magnitude", target, "+policy.more=2"], "mlp", 0.15)
    gone = [len(result.plan.removed[f"layers.{i}.mlp"]) for i in range(4)]
    assert result.report["policy"]["shares"]["layers.1.mlp"] == 2
    assert abs(gone[1] - 2 * gone[0]) <= 1
    assert gone[0] == pytest.approx(gone[2], abs=1)
