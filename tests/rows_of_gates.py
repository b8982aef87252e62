"""Gates that are trained on the same rows by one process, or by two with half of them each."""

import pytest
import torch
from conftest import example, tiny_llama, token_ids

from prunekit.gates import Training, training
from prunekit.graph import trace
from prunekit.importance import StraightThrough


def train_on_rows(rows):
    """Gates with factors, trained on eight rows in batches of so many: group → scores."""
    model = tiny_llama(layers=1, ffn=16)
    graph = trace(model, example())
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    units = sum(group.num_units for group in groups)
    batches = [{"input_ids": ids, "use_cache": False} for ids in token_ids(8, 9).split(rows)]
    own = Training(steps=8, batch_size=8, holdout=0, plain=1.0)
    with pytest.MonkeyPatch.context() as patch:  # these depend on how rows are made batches
        patch.setattr(training, "_measure_first", lambda *_: torch.arange(units).float())
        return StraightThrough(train=own, scale=True).score(model, graph, groups, batches)


def check_together(one, two):
    """What two processes have found is the same, and what one finds with all of their batches."""
    alone = train_on_rows(8)
    assert any(not torch.equal(values, values.sort().values) for values in alone.values())
    for name, values in alone.items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], values, rtol=1e-3, atol=1e-3)
