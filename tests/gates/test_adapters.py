"""Updates that stay beside the weights are cut with them."""

import torch
from conftest import tiny_llama, token_ids

import prunekit
from prunekit.gates import Training
from prunekit.importance import StraightThrough


def test_updates_that_stay_are_cut_and_scaled_with_their_weights():
    """Without them the weights are the dense ones, of what stays, times the factors."""
    model = tiny_llama(kv_heads=2)
    with torch.no_grad():  # a layer that does nothing goes as a whole
        for output in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            output.weight.mul_(1e-3)
            output.bias.mul_(1e-3)
    dense = {name: own.clone() for name, own in model.state_dict().items()}
    train = Training(steps=3, reach=0, batch_size=8, rank=3, update_rate=0.1, merge=False)
    result = prunekit.prune(
        model,
        ratio=0.5,
        method="llm_pruner",
        policy="uniform",
        importance=StraightThrough(train=train, scale=True),
        calibration=token_ids(8, 9),
        overrides=["scope=global", "shapes=free", "groups=[layer,attention,mlp]"],
    )
    removed, scaled = result.plan.removed, 0
    stack = next(stack for stack in result.graph.stacks)
    stay = [unit for unit in range(3) if unit not in removed[stack.name]]
    assert 0 < len(stay) < 3 and len(result.updates) == 7 * len(stay)
    for name, (up, down) in result.updates.items():
        place = name.split(".")
        place[2] = str(stay[int(place[2])])
        before, base = dense[".".join(place)], result.model.get_parameter(name) - up @ down
        kept = [torch.ones(size, dtype=torch.bool) for size in before.shape]
        for group in result.graph.groups:
            for member in group.members:
                if member.parameter == ".".join(place):
                    kept[member.dim][member.index[removed.get(group.name, [])].flatten()] = False
        before = before[kept[0]][:, kept[1]]
        factors = (base * before).sum(0) / before.square().sum(0)
        torch.testing.assert_close(base, before * factors, rtol=1e-4, atol=1e-5)
        scaled += bool((factors - 1).abs().max() > 1e-2)
        assert (up @ down).abs().max() > 1e-3
    assert scaled
