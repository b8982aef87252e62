"""Gates with all weights trained, and a shape as the budget (Sheared LLaMA)."""

import pytest
import torch
from conftest import example, tiny_llama, token_ids

import prunekit
from prunekit.errors import ConfigError
from prunekit.gates import training
from prunekit.gates.updates import Weights
from prunekit.graph import trace

SHAPE = ["groups=[layer,attention,mlp]", "shapes=free"]
STEPS = ["importance.train.steps=12", "importance.pressure=20", "importance.train.reach=0.2"]
STEPS += ["importance.train.learning_rate=0.5", "data.calibration.batch_size=4"]


def prune(*overrides, model=None, **options):
    return prunekit.prune(
        model or tiny_llama(layers=3, kv_heads=2, ffn=16),
        method=options.pop("method", "sheared"),
        calibration=token_ids(8, 9),
        overrides=[*SHAPE, *overrides],
        **options,
    )


def test_a_model_comes_down_to_exactly_the_shape_with_all_of_its_weights_trained():
    """What is cut is what the gates, with the weights that were trained, leave of the model."""
    left = {}

    class Noting(training._Trainer):
        def run(self, saved):
            learned = super().run(saved)
            ids = token_ids(2, 7)
            with torch.no_grad(), self._open(self.rule.settled()):
                left["logits"] = self.model(input_ids=ids, use_cache=False).logits
            left["changed"] = learned.updates
            return learned

    shape = ["target_shape.layers=2", "target_shape.heads=1", "target_shape.ffn=10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_Trainer", Noting)
        result = prune(*shape, *STEPS)
    layers = result.model.model.layers
    assert len(layers) == 2
    assert {layer.mlp.down_proj.weight.shape[1] for layer in layers} == {10}
    assert {layer.self_attn.k_proj.weight.shape[0] for layer in layers} == {6}
    with torch.no_grad():
        own = result.model(input_ids=token_ids(2, 7), use_cache=False).logits
    torch.testing.assert_close(own, left["logits"], rtol=1e-4, atol=1e-5)
    changed = left["changed"]
    assert (
        changed.keys() == dict(tiny_llama(layers=3, kv_heads=2, ffn=16).named_parameters()).keys()
    )
    assert sum(bool(delta.any()) for (delta,) in changed.values()) > len(changed) / 2


def test_a_hidden_size_is_cut_in_all_layers_at_once():
    chosen = ["groups=channel", "target_shape.hidden=20", "importance=magnitude"]
    result = prune(*chosen, method="llm_pruner", policy="uniform")
    assert result.model.get_input_embeddings().weight.shape[1] == 20
    assert result.model.config.hidden_size == 20


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["target_shape.hidden=20"], r"target_shape\.hidden: expected channel among groups"),
        (["target_shape.heads=3"], r"target_shape\.heads: .*has 2 units, .*got 3"),
        (["target_shape.ffn=0"], r"target_shape\.ffn: expected a whole number ≥ 1"),
        (["target_shape.ffn=16"], r"target_shape: expected fewer units"),
        (["target_shape.ffn=8", "target.parameters=9"], r"target_shape: expected it without"),
        (["importance.train.rank=2"], r"all_weights: .*only with rank=0"),
    ],
)
def test_what_a_shape_or_a_training_of_weights_cannot_be(asked, expected):
    with pytest.raises(ConfigError, match=expected):
        prune(*asked)


def test_copies_of_weights_are_in_the_model_only_while_they_are_attached():
    model = tiny_llama()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    trained, batch = Weights(model), example()
    with torch.no_grad():
        for own in trained.parameters.values():
            own.mul_(1.1)
        dense = model(**batch).logits
        with trained.attached():
            other = model(**batch).logits
        again = model(**batch).logits
    assert torch.equal(dense, again) and not torch.allclose(dense, other)
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert trace(model, batch).groups
