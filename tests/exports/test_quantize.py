"""A pruned model that torchao quantizes to 8 and 4 bits, in memory and through transformers."""

import pytest
import torch
from conftest import command_line, example, tiny_llama, token_ids
from processes import run_python
from torch import nn

import prunekit
from prunekit.demo import DEMO_MODEL

torchao = pytest.importorskip("torchao.quantization", reason="the package torchao is missing")
GROUP = 32


def int8():
    return torchao.Int8WeightOnlyConfig()


def int4():
    """4 bits that every device computes with; those of Int4WeightOnlyConfig need a GPU's kernels in
    torchao 0.18.
    """
    from torchao.quantization.granularity import PerGroup

    return torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


@torch.no_grad()
def off(model, expected, ids):
    found = model(input_ids=ids, use_cache=False).logits
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def widths(model):
    return {
        size for p in model.get_decoder().layers.parameters() if p.ndim == 2 for size in p.shape
    }


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """The folder of the embedded model, pruned on the command line to widths that are multiples of
    the group.
    """
    folder = tmp_path_factory.mktemp("aligned")
    given = (
        "method=magnitude",
        "ratio=0.2",
        "eval=none",
        f"scope.width_multiple={GROUP}",
    )
    run = command_line(*given, "output_dir=out", cwd=folder)
    assert not run.returncode, run.stderr
    return folder / "out" / "model"


def test_aligned_widths_are_what_the_group_divides(aligned):
    dense = widths(prunekit.from_pretrained(DEMO_MODEL))
    found = widths(prunekit.from_pretrained(aligned))
    assert found != dense
    assert all(width % GROUP == 0 for width in found)


@pytest.mark.parametrize(("options", "multiple"), [([], 32), (["scope.width_multiple=64"], 64)])
def test_all_widths_are_aligned_by_default(options, multiple):
    model = prunekit.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    prunekit.prune(
        model,
        ratio=0.2,
        method="magnitude",
        overrides=options,
        calibration=token_ids(8, 16),
    )
    assert all(width % multiple == 0 for width in widths(model))


@pytest.mark.parametrize("config, worst", [(int8, 0.02), (int4, 0.2)])
def test_linears_in_memory(aligned, config, worst):
    model, ids = prunekit.from_pretrained(aligned, dtype=torch.float32), token_ids(2, 20)
    expected = logits(model, ids)
    torchao.quantize_(
        model, config(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head"
    )
    assert all(type(layer.mlp.down_proj.weight) is not nn.Parameter for layer in model.model.layers)
    assert 1e-4 < off(model, expected, ids) < worst
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_int8_needs_no_alignment_and_groups_do(aligned):
    model, ids = tiny_llama(), token_ids(2, 20)
    graph = prunekit.trace(model, example())
    prunekit.apply_plan(
        model, graph, prunekit.PruningPlan({"layers.0.self_attn": [1], "layers.1.mlp": [0, 3, 7]})
    )
    expected = logits(model, ids)
    torchao.quantize_(model, int8())
    assert off(model, expected, ids) < 0.02
    with pytest.raises(AssertionError, match="divisible by block_size"):
        torchao.quantize_(tiny_llama(), int4())


THROUGH = """
import sys
import torch
import prunekit
from test_quantize import int4, int8, logits, off, token_ids
from transformers import AutoModelForCausalLM, TorchAoConfig

prunekit.register_with_transformers()
ids = token_ids(2, 20)
expected = logits(prunekit.from_pretrained(sys.argv[1], dtype=torch.float32), ids)
for config, worst in ((int8, 0.02), (int4, 0.2)):
    how = TorchAoConfig(config())
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.float32, quantization_config=how
    )
    assert type(model.model.layers[0].mlp.down_proj.weight) is not torch.nn.Parameter
    assert 1e-4 < off(model, expected, ids) < worst
    model.save_pretrained(config.__name__)
    again = AutoModelForCausalLM.from_pretrained(config.__name__)
    assert torch.equal(logits(again, ids), logits(model, ids))
"""


def test_through_transformers(aligned, tmp_path):
    """In a process of its own: registering changes transformers for good."""
    run = run_python(THROUGH, aligned, cwd=tmp_path)
    assert not run.returncode, run.stderr[-3000:]
