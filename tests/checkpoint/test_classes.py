"""Models that are no causal language models: each is saved and loaded as what it is."""

import json

import pytest
import torch
import transformers
from conftest import randomise, token_ids
from processes import run_python
from safetensors.torch import save_file

import prunekit
from prunekit.checkpoint import open_streamed

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
TEXT = SMALL | {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = SMALL | {"image_size": 16, "patch_size": 8, "projection_dim": 24}
ENCODER_DECODER = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Class → (values of its config, names of its inputs, the auto class that loads it).
CASES = {
    "BertForSequenceClassification": (TEXT, ["input_ids"], "AutoModelForSequenceClassification"),
    "BertModel": (TEXT, ["input_ids"], "AutoModel"),
    "RobertaForTokenClassification": (TEXT, ["input_ids"], "AutoModelForTokenClassification"),
    "LlamaForSequenceClassification": (TEXT, ["input_ids"], "AutoModelForSequenceClassification"),
    "RwkvForCausalLM": (TEXT | {"use_cache": False}, ["input_ids"], "AutoModelForCausalLM"),
    "ViTForImageClassification": (VISION, ["pixel_values"], "AutoModelForImageClassification"),
    "ResNetForImageClassification": (
        {"embedding_size": 16, "hidden_sizes": [24, 32], "depths": [2, 2]},
        ["pixel_values"],
        "AutoModelForImageClassification",
    ),
    "CLIPModel": (
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 24},
        ["input_ids", "pixel_values"],
        "AutoModel",
    ),
    "T5ForConditionalGeneration": (
        TEXT | {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3},
        ["input_ids", "decoder_input_ids"],
        "AutoModelForSeq2SeqLM",
    ),
    "MarianMTModel": (  # its class leaves its positions out of what it saves
        ENCODER_DECODER | {"max_position_embeddings": 16},
        ["input_ids", "decoder_input_ids"],
        "AutoModelForSeq2SeqLM",
    ),
    "WhisperForConditionalGeneration": (
        ENCODER_DECODER | {"num_mel_bins": 8, "max_source_positions": 16},
        ["input_features", "decoder_input_ids"],
        "AutoModelForSpeechSeq2Seq",
    ),
}
LOAD = """
import sys
import torch
import transformers

if sys.argv[1] == "registered":
    import prunekit

    prunekit.register_with_transformers()
else:
    sys.modules["prunekit"] = None  # as good as not installed
for case in sys.argv[2:]:
    name, auto = case.split(":")
    load, trust = getattr(transformers, auto).from_pretrained, sys.argv[1] == "remote"
    model = load(name, trust_remote_code=trust).eval()
    assert type(model).__name__ == f"Pruned{name}", type(model)
    inputs, expected = torch.load(f"{name}.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected), name
    assert len(model.base_model.state_dict())
"""


def inputs_of(names, seed):
    """Two samples for each argument of a forward call."""
    torch.manual_seed(seed)
    made = {"pixel_values": torch.randn(2, 3, 16, 16), "input_features": torch.randn(2, 8, 32)}
    return {name: made[name] if name in made else token_ids(2, 9, seed) for name in names}


def prune(name, groups="block"):
    """A model of random numbers, its dense copy with the cut units zeroed, and inputs for both."""
    values, names, _ = CASES[name]
    stock = getattr(transformers, name)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(randomise(stock(stock.config_class(**values)), 0.1).eval())
    model, masked = models
    overrides = ["policy=uniform", "shapes=free", f"groups={groups}"]
    result = prunekit.prune(
        model,
        ratio=0.1,
        method="magnitude",
        calibration=[inputs_of(names, 1)],
        overrides=overrides,
    )
    with torch.no_grad():
        for group, units in result.plan.removed.items():
            for member in result.graph[group].consumers:
                weight = masked.get_parameter(member.parameter)
                weight.index_fill_(member.dim, member.index[list(units)].flatten(), 0)
    return model, masked, inputs_of(names, 2)


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every class pruned and saved, with new inputs and what it computes of them beside it."""
    folder = tmp_path_factory.mktemp("classes")
    for name in CASES:
        model, masked, inputs = prune(name)
        expected = outputs(model, inputs)
        assert torch.allclose(expected, outputs(masked, inputs), atol=1e-5), name
        torch.save([inputs, expected], folder / f"{name}.pt")
        prunekit.save_pretrained(model, folder / name, remote_code=True)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_folder_holds_the_class_of_its_model(folders, name):
    again = prunekit.from_pretrained(folders / name)
    assert type(again).__name__ == name
    inputs, expected = torch.load(folders / f"{name}.pt", weights_only=True)
    assert torch.equal(outputs(again, inputs), expected)


@pytest.mark.parametrize("way", ["registered", "remote"])
def test_auto_classes_load_what_a_folder_holds(folders, way):
    cases = [f"{name}:{auto}" for name, (_, _, auto) in CASES.items()]
    done = run_python(LOAD, way, *cases, cwd=folders)
    assert not done.returncode, done.stderr[-3000:]


def test_a_pruned_body_gets_another_head(folders, tmp_path):
    """An encoder that was cut is fine-tuned for another task."""
    done = run_python(
        """
import sys
import torch
import transformers, prunekit

prunekit.register_with_transformers()
classifier, body = sys.argv[1:]
tagger = transformers.AutoModelForTokenClassification.from_pretrained(classifier).eval()
whole = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
other = transformers.AutoModelForMaskedLM.from_pretrained(body).eval()
alone = transformers.AutoModel.from_pretrained(body).eval()
ids = torch.arange(3, 12)[None]
with torch.no_grad():
    assert torch.equal(tagger.bert(ids)[0], whole.bert(ids)[0])
    assert torch.equal(other.bert(ids)[0], alone(ids)[0])
assert other(ids).logits.shape == (1, 9, 97)
""",
        folders / "BertForSequenceClassification",
        folders / "BertModel",
        cwd=tmp_path,
    )
    assert not done.returncode, done.stderr[-3000:]


def test_a_dense_folder_is_loaded_as_its_class(tmp_path):
    config = transformers.BertConfig(**TEXT)
    model = transformers.BertForTokenClassification(config).eval()
    prunekit.save_pretrained(model, tmp_path / "model")
    assert type(prunekit.from_pretrained(tmp_path / "model")) is type(model)
    described = tmp_path / "model" / "config.json"
    (tmp_path / "model" / "prunekit.json").unlink()
    values = json.loads(described.read_text()) | {"architectures": ["NoClassOfTransformers"]}
    described.write_text(json.dumps(values))
    with pytest.raises(prunekit.PrunekitError, match="missing"):  # a language model's head
        prunekit.from_pretrained(tmp_path / "model")


def test_a_model_inside_another_is_saved_as_its_class(tmp_path):
    """Its class is none of those that can be imported from transformers itself."""
    from transformers.models.blt import configuration_blt, modeling_blt

    config = configuration_blt.BltGlobalTransformerConfig(**SMALL, encoder_cross_output_size=32)
    model = randomise(modeling_blt.BltGlobalTransformer(config), 0.1).eval()
    inputs = {"inputs_embeds": torch.randn(2, 9, 32)}
    prunekit.prune(model, ratio=0.1, method="magnitude", calibration=[inputs])
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model")
    assert type(again) is type(model)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_what_transformers_cannot_build_is_refused_with_a_way_out(tmp_path):
    text = SMALL | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    config = {"model_type": "gemma4_assistant", "text_config": text | {"model_type": "gemma4_text"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {f"weight_{number}": torch.zeros(1) for number in range(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(prunekit.PrunekitError, match="itself can't make .* take a version that"):
        prunekit.from_pretrained(tmp_path)


def test_a_class_that_computes_a_weight_is_not_read_layer_by_layer(tmp_path):
    config = transformers.MarianConfig(**ENCODER_DECODER, max_position_embeddings=16)
    transformers.MarianMTModel(config).save_pretrained(tmp_path)
    match = r"embed_positions.weight is in no file.*; expected memory.stream=false"
    with pytest.raises(prunekit.PrunekitError, match=match):
        open_streamed(tmp_path)


def test_encoder_and_decoder_keep_widths_of_their_own(folders):
    shapes = prunekit.from_pretrained(folders / "MarianMTModel").state_dict()
    widths = {
        side: [len(shapes[f"model.{side}.layers.{i}.fc1.weight"]) for i in range(2)]
        for side in ("encoder", "decoder")
    }
    assert widths["encoder"][0] < widths["decoder"][0] < 48


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ResNetForImageClassification"])
def test_channels_of_other_classes_are_saved_too(name, tmp_path):
    model, _, inputs = prune(name, "channel")
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model")
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_a_width_of_another_name_is_written_down_under_that_name(tmp_path):
    """EfficientNet's config has a `hidden_dim` and no `hidden_size`."""
    blocks = {"kernel_sizes": [3], "in_channels": [16], "out_channels": [16], "strides": [1]}
    blocks |= {"num_block_repeats": [1], "expand_ratios": [1], "depthwise_padding": []}
    config = transformers.EfficientNetConfig(width_coefficient=0.25, hidden_dim=320, **blocks)
    model, inputs = transformers.EfficientNetModel(config).eval(), inputs_of(["pixel_values"], 1)
    overrides = ["groups=channel"]
    prunekit.prune(model, ratio=0.1, method="magnitude", calibration=[inputs], overrides=overrides)
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model")
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_a_width_that_the_model_returns_is_no_channel():
    """CLIP returns the hidden states of both of its sides."""
    with pytest.raises(prunekit.PrunekitError, match="channel.* is an axis of the model's output"):
        prune("CLIPModel", "channel")
