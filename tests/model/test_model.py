"""Names of sizes, per-layer configs, stacks and ties of a tiny model; what transformers needs."""

import copy
import json

import pytest
import torch
from conftest import example, tiny_llama
from torch import nn
from transformers import GPT2Config, LlamaConfig, MixtralConfig, MixtralForCausalLM

from prunekit.errors import CheckpointError, ConfigError
from prunekit.model.attributes import fit_to_weight, resize
from prunekit.model.build import adopt, build_dense, build_pruned, make_dense_config
from prunekit.model.compat import (
    experts_computed,
    has,
    let_save_itself,
    make_config,
    read,
    unvalidated,
)
from prunekit.model.depth import drop_layers
from prunekit.model.inputs import check_length, longest, without_cache
from prunekit.model.names import (
    config_name,
    experts_per_token,
    head_dim_of,
    layer_counts,
    quantity_of,
)
from prunekit.model.per_layer import config_values, layer_sizes, set_per_layer
from prunekit.model.stack import (
    all_layers,
    foreign_index,
    index_attributes,
    main_stack,
    module_lists,
    stacks_around,
)
from prunekit.model.ties import canonical_names, names_after, parameter_places, shared_names

MIXTRAL = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 31,
}


def test_a_size_goes_by_the_name_its_config_has():
    llama, gpt2 = LlamaConfig(num_hidden_layers=3), GPT2Config(n_layer=5, n_embd=48, n_head=4)
    assert config_name(llama, "intermediate_size") == "intermediate_size"
    assert config_name(gpt2, "intermediate_size") == "n_inner"  # there, though it is None
    assert config_name(gpt2, "num_key_value_heads") is None
    assert (layer_counts(llama), set(layer_counts(gpt2))) == ([3], {5})
    assert head_dim_of(gpt2) == 12
    assert (quantity_of("n_embd"), quantity_of("colour")) == ("hidden_size", "colour")


def test_experts_that_a_token_needs():
    assert experts_per_token(MixtralConfig(**MIXTRAL)) == 2
    assert experts_per_token(LlamaConfig()) is None
    assert experts_per_token(None) is None


def test_attributes_follow_where_they_hold_the_old_size():
    module = nn.Linear(4, 6)
    module.hidden_dim, module.ffn_dim, module.n_inner = 6, 7, (6,)
    resize([module], {"intermediate_size": (6, 5)})
    assert (module.hidden_dim, module.ffn_dim, module.n_inner) == (5, 7, (5,))
    module.weight = nn.Parameter(torch.zeros(3, 2))
    fit_to_weight(module)
    assert (module.out_features, module.in_features) == (3, 2)


def test_per_layer_values_are_seen_inside_their_layer_alone():
    model = tiny_llama()
    set_per_layer(model, {1: {"intermediate_size": 24}})
    layers = model.model.layers
    assert [layer.mlp.config.intermediate_size for layer in layers] == [40, 24, 40]
    assert layers[1].mlp.config.hidden_size == 48
    assert read(model.config, "intermediate_size") == 40
    assert has(model.config, "intermediate_size")
    with pytest.raises(Exception, match="per-layer attribute"):  # what `read` is for
        _ = model.config.intermediate_size


def test_values_that_all_layers_share_become_global():
    model = tiny_llama()
    set_per_layer(model, {layer: {"intermediate_size": 24} for layer in range(3)})
    assert model.config.intermediate_size == 24
    assert not model.config.is_heterogeneous
    assert all(
        module.config is model.config
        for module in model.model.layers[0].children()
        if "config" in vars(module)
    )


def test_what_follows_from_a_layers_values():
    config = tiny_llama(kv_heads=4).config
    changes = layer_sizes(config, {"num_attention_heads": 4, "num_key_value_heads": 2})
    assert {"num_attention_heads": (8, 4)} in changes
    assert changes[-2:] == [{"num_key_value_groups": (2, 2)}, {"attention_width": (48, 24)}]
    assert config_values(config, {}, {"intermediate_size": (40, 24)}) == {"intermediate_size": 24}
    assert config_values(config, {}, {"num_key_value_groups": (2, 1)}) == {}


def test_a_config_forgets_its_dropped_layers():
    config = LlamaConfig(num_hidden_layers=4)
    config.layer_types = ["a", "b", "a", "b"]
    config.no_rope_layers = [1, 0, 1, 0]
    config.sliding_layers = [1, 3]
    config.eos_token_id = [1, 2, 3, 4]
    config.max_window_layers = 2
    drop_layers(config, 4, [0, 3])
    assert (config.num_hidden_layers, config.layer_types) == (2, ["a", "b"])
    assert (config.no_rope_layers, config.sliding_layers) == ([1, 0], [1])
    assert (config.eos_token_id, config.max_window_layers) == ([1, 2, 3, 4], 1)


class Tower(nn.Module):
    """Two lists of layers, one inside a `Sequential`; a list of experts inside a layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.ModuleList(nn.Linear(2, 2) for _ in "ab"))
        self.second = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(9, 9)])}) for _ in "abc"
        )


def test_stacks_are_the_outermost_lists():
    tower = Tower()
    assert list(module_lists(tower)) == ["first.1", "second"]
    assert main_stack(tower) is tower.second
    assert all_layers(tower) == [*tower.first[1], *tower.second]
    assert stacks_around(tower, ["first.1.0", "second.2.experts.0"]) == {"first.1", "second"}
    assert stacks_around(tower, ["first.0"]) == {None}
    assert main_stack(nn.Linear(2, 2)) is None


def test_indices_that_layers_keep():
    stack = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    for index, layer in enumerate(stack):
        layer.layer_idx = index
    assert list(index_attributes(stack)) == [("", "layer_idx", 0)]
    assert foreign_index(stack) is None
    stack[0].layer_idx = 2
    assert foreign_index(stack) == "layer_idx"


def test_tied_tensors_have_one_canonical_name():
    model = tiny_llama(tied=True)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    assert shared_names(model) == {embedding: (embedding, head)}
    assert canonical_names(model)[head] == embedding
    assert [place.name for place in parameter_places(model)[embedding]] == [embedding, head]
    assert parameter_places(model).keys() == dict(model.named_parameters()).keys()


def test_a_shared_module_is_held_under_both_names():
    shared = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(shared, shared)
    assert shared_names(model) == {"0.weight": ("0.weight", "1.weight")}
    assert names_after(["0.weight"], shared_names(model), {}) == {"0.weight": "0.weight"}


def test_names_once_layers_are_gone():
    names = [f"layers.{i}.w" for i in range(4)]
    assert names_after(names, {}, {"layers": [0, 2]}) == {
        "layers.1.w": "layers.0.w",
        "layers.3.w": "layers.1.w",
    }


def test_no_cache_is_asked_for_only_where_one_would_be_kept():
    model = tiny_llama()
    assert without_cache(model, {"input_ids": 1}) == {"use_cache": False, "input_ids": 1}
    assert without_cache(model, {"use_cache": True}) == {"use_cache": True}
    assert without_cache(model, (1,)) == (1,)
    assert without_cache(nn.Linear(2, 2), {"input": 1}) == {"input": 1}
    assert longest(model) == 64
    with pytest.raises(ConfigError, match="eval.window: expected at most the 64 tokens"):
        check_length("eval.window", 65, model)


def test_a_config_is_made_that_its_class_would_refuse_and_the_class_stays():
    validators = list(LlamaConfig.__class_validators__)
    values = {"hidden_size": 50, "num_attention_heads": 8, "head_dim": 6}
    config = make_config("llama", values)
    assert (type(config), config.hidden_size) == (LlamaConfig, 50)
    assert LlamaConfig.__class_validators__ == validators
    with pytest.raises(Exception, match="not a multiple"):
        LlamaConfig(**values)
    with pytest.raises(Exception, match="layer_types"):  # the other validators are asked
        make_config("llama", values | {"num_hidden_layers": 2, "layer_types": ["no such"]})


def test_a_refused_config_is_written_and_keeps_its_method(tmp_path):
    config = make_config("llama", {"hidden_size": 50, "num_attention_heads": 8, "head_dim": 6})
    with pytest.raises(Exception, match="not a multiple"):
        config.save_pretrained(tmp_path)
    with pytest.raises(KeyError), unvalidated(config):
        config.save_pretrained(tmp_path)
        raise KeyError
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 50
    assert "save_pretrained" not in vars(config)


def test_only_the_config_of_one_model_changes_its_class():
    model, other = tiny_llama(), tiny_llama()
    let_save_itself(model)
    assert type(model.config) is not LlamaConfig
    assert isinstance(model.config, LlamaConfig)
    assert type(other.config) is LlamaConfig


def test_experts_are_computed_as_asked_and_as_before_afterwards():
    model = MixtralForCausalLM(MixtralConfig(**MIXTRAL))
    before = model.config._experts_implementation
    with pytest.raises(KeyError), experts_computed(model, "eager"):
        assert model.config._experts_implementation == "eager"
        raise KeyError
    assert model.config._experts_implementation == before
    with experts_computed(nn.Linear(2, 2), "eager"):
        pass


def test_a_model_is_built_on_meta_and_adopts_its_tensors():
    model = tiny_llama(tied=True)
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    again = build_dense(copy.deepcopy(model.config)).eval()
    assert all(parameter.is_meta for parameter in again.parameters())
    adopt(again, tensors, exact=True)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(**example()).logits, model(**example()).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "^damaged weights: model.norm.weight is missing"),
        ({"more": torch.ones(1)}, "^damaged weights: no place for more"),
        ({"model.norm.weight": torch.ones(48).long()}, "expected floating point numbers"),
        ({"model.norm.weight": torch.ones(47)}, r"expected shape \(48,\), got \(47,\)"),
    ],
)
def test_tensors_that_a_model_has_no_use_for(change, message):
    model = tiny_llama()
    tensors = {k: v for k, v in (dict(model.state_dict()) | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        adopt(model, tensors, exact=True)


def test_configs_that_make_no_model_name_no_folder():
    config = json.loads(tiny_llama().config.to_json_string())
    with pytest.raises(CheckpointError, match=r"^damaged: 'no such'"):
        make_dense_config(config | {"model_type": "no such"})
    dense = make_dense_config(config)
    with pytest.raises(CheckpointError, match="^damaged: per_layer_config:"):
        build_pruned(dense, config | {"per_layer_config": {"x": {}}})
