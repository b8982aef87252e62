"""Pruned folders in transformers' own hands: with the code beside them, or registered; prunekit
isn't there, or is.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, token_ids
from families import EXPERTS, build, narrow_heads, values_of
from processes import run_python
from safetensors.torch import load_file

import prunekit
from prunekit.checkpoint import LayerWriter
from prunekit.errors import CheckpointError
from prunekit.model.modeling_prunekit import pruned_config

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "opt",
    "mixtral",
    "qwen3_moe",
)
CUTS = {
    "llama-narrow": "head_dim",
    "gpt2-channels": "channel",
    "opt-channels": "channel",
    "gpt_neox-alike": "alike",
    "gpt2-alike": "alike",
    "llama-odd": "channel",
    "gemma2-odd": "channel",
    "llama-empty": "empty",
    "qwen2-empty": "empty",
    "gpt2-empty": "empty",
    "mixtral-empty": "empty",
    "opt-empty": "empty",
}
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
RUN = """
import sys
sys.modules["prunekit"] = None  # as good as not installed
from pathlib import Path
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
ids, mask = torch.load("ids", weights_only=True)
greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

def load(folder, auto=AutoModelForCausalLM, **kwargs):
    return auto.from_pretrained(folder, trust_remote_code=True, **kwargs)

def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits

for folder in sys.argv[1:]:
    model, found = load(folder), {}
    found["logits"], found["padded"] = logits(model), logits(model, attention_mask=mask)
    found["cached"] = model.generate(ids[:1], **greedy)
    found["batch"] = model.generate(ids, attention_mask=mask, **greedy)
    found["backend"] = model.is_backend_compatible()
    with torch.no_grad():
        body = load(folder, AutoModel)(input_ids=ids).last_hidden_state
        found["body"] = torch.equal(body, model.base_model(input_ids=ids).last_hidden_state)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    found["eager"] = logits(model)
    configs = [m.config for m in model.modules() if "config" in m.__dict__]
    found["attentions"] = {c._attn_implementation for c in configs}
    found["half"] = logits(load(folder, dtype=torch.bfloat16))
    placed = load(folder, device_map="auto", attn_implementation="eager")
    found["placed"] = logits(placed)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    stock = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    shapes = {n: p.shape for n, p in stock.named_parameters()}
    found["built"] = shapes == {n: p.shape for n, p in model.named_parameters()}
    # As an inference engine does it that reads the heads of each layer from the config.
    with torch.device("meta"):
        bare = AutoModel.from_config(config, trust_remote_code=True)
    attentions = [m for m in bare.modules() if hasattr(m, "k_proj")]
    found["heads"] = all(
        m.q_proj.out_features
        == config.per_layer_config[m.layer_idx].num_attention_heads * m.head_dim
        for m in attentions
    )
    found["stock"] = hasattr(transformers, config.architectures[0])
    placed.set_attn_implementation(implementation)
    placed.save_pretrained(f"{folder}-again", max_shard_size="20KB")
    found["again"] = logits(load(f"{folder}-again"))
    found["class"] = type(model).__name__
    torch.save(found, f"{folder}.out")
"""


def pruned(case):
    """Layers of different widths; or what a class would build in other ways: see `CUTS`."""
    family = case.split("-")[0]
    model = build(family, values_of(family))
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    if case in CUTS:
        plans = {
            "head_dim": narrow_heads(graph),
            "channel": {
                g.name: [*range(4), *range(30, 34)] for g in graph.groups if g.kind == "channel"
            },
            "alike": {g.name: [5] for g in graph.groups if g.kind == "attention"},
            "empty": {  # the first layer has no attention, the second neither that nor an FFN
                g.name: range(g.num_units)
                for g in graph.groups
                if (g.kind == "mlp" and g.layer == 1) or g.kind == "attention"
            },
        }
        if case.endswith(
            "odd"
        ):  # heads that don't divide the width, whose class then can't be built from its config
            plans["channel"] |= {g.name: [g.layer] for g in graph.groups if g.kind == "attention"}
        prunekit.apply_plan(model, graph, prunekit.PruningPlan(plans[CUTS[case]]))
        return model
    kinds = {"attention": [[0], [1, 2]], "mlp": [[1, 3], [0, 2, 4, 5, 7]], "expert": [[], [2]]}
    if family in EXPERTS:
        kinds["mlp"] = [list(range(8)), list(range(16))]  # torch multiplies rows of whole 16 bytes
    units = {g.name: kinds[g.kind][g.layer] for g in graph.groups if g.prunable and g.kind in kinds}
    prunekit.apply_plan(
        model, graph, prunekit.PruningPlan({name: kept for name, kept in units.items() if kept})
    )
    return model


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of every family what this process computes, and what one without prunekit does."""
    folder = tmp_path_factory.mktemp("remote")
    ids, mask = token_ids(3, 9, seed=2), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    torch.save([ids, mask], folder / "ids")
    here = {}
    for family in (*FAMILIES, *CUTS):
        model = pruned(family)
        prunekit.save_pretrained(model, folder / family, remote_code=True)
        mine = {"logits": logits(model, ids), "padded": logits(model, ids, attention_mask=mask)}
        mine |= {
            "cached": model.generate(ids[:1], **GREEDY),
            "backend": model.is_backend_compatible(),
        }
        mine["batch"] = model.generate(ids, attention_mask=mask, **GREEDY)
        model.set_attn_implementation("eager")
        mine |= {
            "eager": logits(model, ids),
            "class": f"Pruned{type(model).__name__}",
            "again": mine["logits"],
        }
        mine |= {
            "placed": mine["eager"],
            "attentions": {"eager"},
            "body": True,
            "built": True,
            "heads": True,
            "stock": False,
        }
        mine["half"] = logits(prunekit.from_pretrained(folder / family, dtype=torch.bfloat16), ids)
        here[family] = mine
    run = run_python(RUN, *FAMILIES, *CUTS, cwd=folder)
    assert not run.returncode, run.stderr[-3000:]
    return folder, ids, here


@pytest.mark.parametrize("family", [*FAMILIES, *CUTS])
def test_a_folder_with_its_code_needs_no_prunekit(found, family):
    folder, ids, here = found
    there = torch.load(folder / f"{family}.out", weights_only=True)
    assert there.keys() == here[family].keys()
    for name, expected in here[family].items():
        same = (
            torch.equal(there[name], expected)
            if isinstance(expected, torch.Tensor)
            else there[name] == expected
        )
        assert same, name
    assert len(list((folder / f"{family}-again").glob("*.safetensors"))) > 1
    assert torch.equal(
        logits(prunekit.from_pretrained(folder / f"{family}-again"), ids), here[family]["logits"]
    )


REGISTER = """
import sys
import torch
import prunekit
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

pruned, remote, dense, tokens = sys.argv[1:]
module = AutoConfig.from_pretrained.__module__
assert module.startswith("transformers."), "importing patches nothing"
for folder in (pruned, remote):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception:
        pass
    else:
        raise AssertionError("a stock class must not take it")
prunekit.register_with_transformers()
first = AutoConfig.from_pretrained
prunekit.register_with_transformers()
assert AutoConfig.from_pretrained is first
ids, found = torch.load(tokens, weights_only=True), []
for folder in (pruned, remote):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "PrunedLlamaForCausalLM"
    assert AutoModel.from_pretrained(folder).config.per_layer_config[0].intermediate_size == 38
    model.save_pretrained(f"{folder}-again", max_shard_size="20KB")
    prunekit.save_pretrained(model, f"{folder}-ours")
    for path in (folder, f"{folder}-again", f"{folder}-ours"):
        found += [AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits.detach()]
        found += [prunekit.from_pretrained(path)(input_ids=ids).logits.detach()]
    assert AutoTokenizer.from_pretrained(folder)("import")["input_ids"]
ran = [name for name in sys.modules if name.startswith("transformers_modules")]
assert not ran, "no code of a folder ran"
stock = AutoModelForCausalLM.from_pretrained(dense)
assert type(stock).__module__.startswith("transformers.models.")
assert type(stock.config) is LlamaConfig
options = {"use_cache": False, "other": 1}
config, unused = AutoConfig.from_pretrained(pruned, return_unused_kwargs=True, **options)
assert (config.use_cache, unused) == (False, {"other": 1})
try:
    LlamaConfig(hidden_size=50, num_attention_heads=7)
except Exception:
    pass
else:
    raise AssertionError("the stock config still checks its sizes")
torch.save(found, "registered")
"""


def test_registered_classes_load_pruned_folders_and_leave_stock_ones_alone(tmp_path):
    from prunekit.checkpoint import load_tokenizer
    from prunekit.demo import DEMO_MODEL

    model, tokenizer, ids = pruned("llama"), load_tokenizer(DEMO_MODEL), token_ids(3, 9, seed=2)
    torch.save(ids, tmp_path / "ids")
    prunekit.save_pretrained(model, tmp_path / "pruned", tokenizer)
    prunekit.save_pretrained(model, tmp_path / "remote", tokenizer, remote_code=True)
    prunekit.save_pretrained(tiny_llama(), tmp_path / "dense")
    given = (REGISTER, "pruned", "remote", "dense", "ids")
    done = run_python(*given, cwd=tmp_path)
    assert not done.returncode, done.stderr[-3000:]
    found = torch.load(tmp_path / "registered", weights_only=True)
    assert len(found) == 12
    assert all(torch.equal(got, logits(model, ids)) for got in found)
    config = json.loads((tmp_path / "remote-ours" / "config.json").read_text())
    assert "auto_map" not in config, "code is for those who ask for it"
    assert config["architectures"] == ["LlamaForCausalLM"]
    path = tmp_path / "pruned" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    damaged = run_python(*given, cwd=tmp_path)
    assert "config.json is not as it was saved" in damaged.stderr


def test_models_of_ours_are_saved_by_transformers_too(tmp_path):
    model = pruned("gpt2")
    prunekit.save_pretrained(model, tmp_path / "first")
    prunekit.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert "pruned_sizes" in json.loads((tmp_path / "second/config.json").read_text())
    ids = token_ids(3, 9, seed=2)
    assert torch.equal(
        logits(prunekit.from_pretrained(tmp_path / "second"), ids), logits(model, ids)
    )


def test_prunekit_does_not_run_the_code_and_notices_changes_to_it(tmp_path):
    model, ids = pruned("llama"), token_ids(3, 9, seed=2)
    prunekit.save_pretrained(model, tmp_path / "model", remote_code=True)
    (tmp_path / "model" / "modeling_prunekit.py").write_text("raise RuntimeError('this ran')")
    with pytest.raises(CheckpointError, match=r"modeling_prunekit\.py is not as it was saved"):
        prunekit.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "prunekit.json").unlink()
    for trust in (False, True):  # a folder of ours needs no code here
        again = prunekit.from_pretrained(tmp_path / "model", trust_remote_code=trust)
        assert torch.equal(logits(again, ids), logits(model, ids))
    prunekit.save_pretrained(again, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_model_that_a_stock_class_builds_gets_no_code(tmp_path):
    prunekit.save_pretrained(tiny_llama(), tmp_path / "model", remote_code=True)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "prunekit.json",
    ]
    assert (
        not {"auto_map", "pruned_sizes"}
        & json.loads((tmp_path / "model" / "config.json").read_text()).keys()
    )


def test_a_folder_written_layer_by_layer_is_the_same(tmp_path):
    model = pruned("llama")
    prunekit.save_pretrained(model, tmp_path / "whole", remote_code=True)
    writer = LayerWriter(tmp_path / "streamed")
    writer.write("all", load_file(tmp_path / "whole" / "model.safetensors"))
    writer.finish(model, remote_code=True)
    for name in ("config.json", "modeling_prunekit.py"):
        assert (tmp_path / "streamed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_pruning_on_replaces_what_a_folder_said_of_sizes(tmp_path):
    """Also what a cut through all layers changes."""
    ids = token_ids(3, 9, seed=2)
    prunekit.save_pretrained(pruned("llama"), tmp_path / "model", remote_code=True)
    model = prunekit.from_pretrained(tmp_path / "model")
    for number, kinds in enumerate((["mlp"], ["channel"], ["attention"])):
        graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
        removed = {g.name: [0] for g in graph.groups if g.kind in kinds and g.layer in (0, None)}
        prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
        prunekit.save_pretrained(model, tmp_path / str(number), remote_code=True)
        before, model = model, prunekit.from_pretrained(tmp_path / str(number))
        assert torch.equal(logits(model, ids), logits(before, ids))


def test_a_folder_with_per_layer_values_only_is_loaded(tmp_path):
    """As other programs write it."""
    model, ids = pruned("llama"), token_ids(3, 9, seed=2)
    prunekit.save_pretrained(model, tmp_path / "model")
    (tmp_path / "model" / "prunekit.json").unlink()
    path = tmp_path / "model" / "config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pruned_sizes"})
    )
    assert torch.equal(
        logits(prunekit.from_pretrained(tmp_path / "model"), ids), logits(model, ids)
    )


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"shapes": {}},
        {"shapes": {"model.norm.weight": "[1"}, "attributes": {}},
        {"shapes": {"model.norm.weight": "3"}, "attributes": {}},
        {"shapes": [], "attributes": {"model.layers.{}.mlp.x": "7"}},
    ],
)
def test_a_damaged_record_is_a_clean_error(tmp_path, record):
    prunekit.save_pretrained(pruned("llama"), tmp_path / "model")
    (tmp_path / "model" / "prunekit.json").unlink()
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pruned_sizes": record}))
    with pytest.raises(CheckpointError, match=r"config\.json: damaged") as caught:
        prunekit.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_the_code_imports_nothing_of_prunekit():
    import prunekit.model.modeling_prunekit as code

    lines = Path(code.__file__).read_text().splitlines()
    assert not [
        line for line in lines if line.strip().startswith(("from prunekit", "import prunekit"))
    ]


def test_the_width_of_experts_is_read_by_layer_where_it_is_read_of_the_model(tmp_path):
    """As vLLM does it; any other size that differs is an error of transformers' there."""
    model = pruned("qwen3_moe")
    prunekit.save_pretrained(model, tmp_path / "model")
    config = pruned_config("qwen3_moe", __name__).from_pretrained(tmp_path / "model")
    widths = [layer.mlp.experts.down_proj.shape[2] for layer in model.model.layers]
    assert config.moe_intermediate_size == widths == [16, 8]
    with pytest.raises(RuntimeError, match="num_attention_heads"):
        _ = config.num_attention_heads
