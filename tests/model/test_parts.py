"""Models that also see: the language model is pruned, the tower where `groups` names it."""

import pytest
import torch
import transformers
from conftest import randomise, token_ids

import prunekit
from prunekit.data.batches import split_samples, take_rows
from prunekit.errors import ConfigError
from prunekit.model.parts import find_language_part

IMAGE = 96  # the token that stands for a part of an image
VISION = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = VISION | {
    "vocab_size": 97,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROTARY = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def llava():
    vision = VISION | {"num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
        )
    )


def qwen():
    vision = VISION | {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4}
    windows = {"window_size": 16, "fullatt_block_indexes": [1]}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            vision_config=vision | windows,
            text_config=TEXT | {"rope_parameters": ROTARY},
            image_token_id=IMAGE,
            video_token_id=95,
            vision_start_token_id=94,
            vision_end_token_id=93,
        )
    )


def inputs_of(build, seed):
    """Three samples, of four image tokens and eight others each."""
    torch.manual_seed(seed)
    ids = token_ids(3, 12, seed).clamp(max=90)
    ids[:, 2:6] = IMAGE
    if build is llava:
        return {"input_ids": ids, "pixel_values": torch.randn(3, 3, 16, 16)}
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(48, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def make(build):
    torch.manual_seed(0)
    return randomise(build(), 0.1).eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def prune(build, groups="block", method="slimgpt"):
    model, inputs = make(build), inputs_of(build, 1)
    overrides = ["policy=uniform", "shapes=free", f"groups={groups}"]
    return prunekit.prune(
        model, ratio=0.1, method=method, calibration=[inputs], overrides=overrides
    )


@pytest.mark.parametrize("method", ["slimgpt", "llm_pruner"])
@pytest.mark.parametrize("build", [llava, qwen])
def test_the_language_model_is_pruned_with_images(build, method, tmp_path):
    dense = make(build)
    result = prune(build, method=method)
    part = find_language_part(dense)
    assert part == "model.language_model"
    for name, parameter in result.model.named_parameters():
        if not name.startswith(part):
            assert torch.equal(parameter, dense.get_parameter(name)), name
    prunekit.save_pretrained(result.model, tmp_path / "model")
    again, new = prunekit.from_pretrained(tmp_path / "model"), inputs_of(build, 2)
    assert type(again) is type(dense)
    assert torch.equal(logits(again, new), logits(result.model, new))
    greedy = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(again.generate(**new, **greedy), result.model.generate(**new, **greedy))


@pytest.mark.parametrize("groups", ["block", "[block,tower]"])
def test_cut_equals_masked_on_other_images(groups):
    result, masked, new = prune(llava, groups, "magnitude"), make(llava), inputs_of(llava, 2)
    with torch.no_grad():
        for name, units in result.plan.removed.items():
            for member in result.graph[name].consumers:
                weight = masked.get_parameter(member.parameter)
                weight.index_fill_(member.dim, member.index[list(units)].flatten(), 0)
    paths = {result.graph[name].module for name in result.plan.removed}
    assert any("vision" in path for path in paths) == (groups == "[block,tower]")
    assert torch.allclose(logits(result.model, new), logits(masked, new), atol=1e-4)


def test_a_batch_with_images_is_traced_whole():
    """The tower's sizes are computed by Python's operators, which are none of ATen's."""
    graph = prunekit.trace(make(llava), inputs_of(llava, 1) | {"use_cache": False})
    heads = {group.module for group in graph.groups if group.kind == "attention"}
    for part in ("vision_tower", "language_model"):
        assert sum(part in module for module in heads) == 2


def test_what_can_not_be_traced_with_images_is_traced_without():
    """Qwen's tower takes shapes from numbers; whatever may be coupled to it is left alone."""
    graph = prune(qwen, method="magnitude").graph
    assert "pixel_values" not in graph.example_inputs
    assert IMAGE not in graph.example_inputs["input_ids"]
    channels = [group for group in graph.groups if group.kind == "channel"]
    assert channels and not any(group.prunable for group in channels)
    assert "what it sees" in channels[0].reason
    with pytest.raises(ConfigError, match="groups=tower: .* beside a language model"):
        prune(qwen, "tower", "magnitude")


def test_patches_go_with_their_rows():
    batch = inputs_of(qwen, 1)
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 6]])
    parts = [sample["pixel_values"] for sample in split_samples(batch)]
    assert [len(part) for part in parts] == [16, 8, 24]
    assert torch.equal(torch.cat(parts), batch["pixel_values"])
    turned = take_rows(batch, [2, 0])
    assert torch.equal(turned["pixel_values"], torch.cat([parts[2], parts[0]]))
    assert turned["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 4]]


def test_language_models_alone_and_text_readers_have_no_part():
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    assert find_language_part(llama) is None
    assert find_language_part(torch.nn.Linear(2, 2)) is None


def test_a_width_that_the_model_returns_is_no_channel():
    """LLaVA returns the image's hidden states, which are as wide as the language model."""
    with pytest.raises(ConfigError, match="groups=channel: .*axis of the model's output"):
        prune(llava, "channel", "magnitude")
