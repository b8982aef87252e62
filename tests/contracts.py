"""What the contract tests of importances, policies and costs share: names, models, runs."""

from conftest import tiny_llama, token_ids

import prunekit
from prunekit import config as cfg
from prunekit.config.sections import LIMITS

LAYERS_ONLY = ("alternate", "similarity")
EXPERTS_ONLY = ("reap",)
LEARNED = {
    "straight_through": {"train.steps": 2, "train.reach": 0},
    "hard_concrete": {
        **{"train.steps": 8, "train.reach": 0, "train.learning_rate": 1},
        **{"pressure": 20, "scale": "false"},
    },
}
# Units are scored as one structure.
WHOLE = (*LAYERS_ONLY, *EXPERTS_ONLY, *LEARNED, "ablation", "mixed", "peak_to_peak")
IMPORTANCES = sorted(path.stem for path in (cfg.config_dir() / "importance").glob("*.yaml"))
POLICIES = sorted(path.stem for path in (cfg.config_dir() / "policy").glob("*.yaml"))
SCOPES = sorted(path.stem for path in (cfg.config_dir() / "scope").glob("*.yaml"))
COSTS = sorted(path.stem for path in (cfg.config_dir() / "cost").glob("*.yaml"))
AGGREGATIONS = ("sum", "mean", "max", "prod", "first", "last")
SEARCH = {"rounds": 1, "sweeps": 1, "generations": 1, "children": 2, "seeds": "[uniform]"}
VALUES = {
    "manual": ["policy.values=[1,0.5,0,2]"],
    "single": ["policy.layer=1"],
    "search": [f"policy.{key}={value}" for key, value in SEARCH.items()],
}
# The ranks of a group's only two units may be equal in the mean.
MORE = {"mixed": ["importance.weights=[2,1]"]}
TARGETS = tuple(f"target.{name}=" for name in LIMITS)


def overrides(importance, aggregation, policy, scope):
    chosen = [
        f"importance={importance}",
        f"policy={policy}",
        f"scope={scope}",
        *VALUES.get(policy, ()),
        *MORE.get(importance, ()),
    ]
    for key, value in LEARNED.get(importance, {}).items():
        chosen.append(f"importance.{key}={value}")
    if importance not in WHOLE:
        chosen.append(f"importance.aggregation={aggregation}")
    return chosen


def run_on(model, chosen, ratio=0.2):
    if any(one.startswith(TARGETS) for one in chosen):
        ratio = None
    return prunekit.prune(
        model, ratio=ratio, method="llm_pruner", calibration=token_ids(4, 8), overrides=chosen
    )


def run(chosen, groups="block", ratio=0.08):
    model = tiny_llama(kv_heads=2, layers=4)
    return model, run_on(model, [*chosen, f"groups={groups}"], ratio)
