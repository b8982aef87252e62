"""Plans travel: `plan.json` and the dense model give the pruned shapes, and no other model does."""

import pytest
import torch
from conftest import command_line, example, tiny_llama, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

import prunekit
from prunekit.checkpoint import load_tokenizer
from prunekit.demo import DEMO_MODEL
from prunekit.errors import TraceError

RUNS = {
    "slimgpt": [],
    "llm_pruner": ["scope=iterative", "scope.rounds=3"],
    "magnitude": [
        "policy=uniform",
        "groups=layer",
        "importance=similarity",
        "compensation=none",
        "schedule=oneshot",
    ],
}


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", RUNS)
def test_a_plan_and_the_dense_model_give_the_shapes_again(tmp_path, method):
    model = tiny_llama(layers=4)
    result = prunekit.prune(
        model, ratio=0.3, method=method, calibration=token_ids(8, 12), overrides=RUNS[method]
    )
    prunekit.save_pretrained(model, tmp_path / "model")
    (tmp_path / "plan.json").write_text(result.plan.to_json())
    plan, dense = prunekit.PruningPlan.load(tmp_path / "plan.json"), tiny_llama(layers=4)
    assert plan.fingerprint and plan == result.plan
    prunekit.apply_plan(dense, prunekit.trace(dense, example()), plan)
    saved = prunekit.from_pretrained(tmp_path / "model")
    assert shapes(dense) == shapes(saved) != shapes(tiny_llama(layers=4))
    assert dense.config.to_dict().get("per_layer_config") == saved.config.to_dict().get(
        "per_layer_config"
    )
    assert dense(input_ids=token_ids()).logits.shape == saved(input_ids=token_ids()).logits.shape


def test_the_plan_of_a_finished_run(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    prunekit.save_pretrained(
        LlamaForCausalLM(config), tmp_path / "dense", load_tokenizer(DEMO_MODEL)
    )
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"There were {n} numbers, then {n + 1}." for n in range(400))
    )
    done = command_line(
        "model.path=dense",
        "method=magnitude",
        "ratio=0.1",
        "eval=figures",
        "eval.corpora=[text.txt]",
        "eval.window=32",
        "eval.max_tokens=256",
        "data.calibration.path=text.txt",
        "data.calibration.samples=8",
        "data.calibration.sequence_length=32",
        "eval.cache=null",
        "output_dir=run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    dense = prunekit.from_pretrained(tmp_path / "dense")
    graph = prunekit.trace(dense, {"input_ids": token_ids(2, 32), "use_cache": False})
    prunekit.apply_plan(dense, graph, prunekit.PruningPlan.load(tmp_path / "run" / "plan.json"))
    assert shapes(dense) == shapes(prunekit.from_pretrained(tmp_path / "run" / "model"))


@pytest.mark.parametrize("other", [{"layers": 4}, {"kv_heads": 8}, {"tied": True}])
def test_a_plan_refuses_another_model(other):
    dense, model = tiny_llama(), tiny_llama(**other)
    plan = prunekit.PruningPlan({"layers.0.mlp": [0]}, prunekit.trace(dense, example()).fingerprint)
    before = shapes(model)
    with pytest.raises(TraceError, match="the plan was made for model"):
        prunekit.apply_plan(
            model, prunekit.trace(model, example()), prunekit.PruningPlan.from_json(plan.to_json())
        )
    assert shapes(model) == before
