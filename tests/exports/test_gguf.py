import inspect
import json
import sys

import pytest
import torch
from conftest import example, randomise, tiny_llama, token_ids
from gguf_helpers import LlamaCpp, fast, letter_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import prunekit
from prunekit.checkpoint import load_tokenizer
from prunekit.demo import DEMO_MODEL
from prunekit.errors import CheckpointError, ExportError
from prunekit.exports.gguf.pretokenizer import WAYS, build_pretokenizer
from prunekit.exports.gguf.tensors import rotary_order
from prunekit.exports.gguf.writer import Gguf
from prunekit.runtime import console

gguf = pytest.importorskip("gguf", reason="the package gguf is missing")
SIZES = {
    "vocab_size": 97,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
ROPE = {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = ROPE | {"rope_type": "yarn"}
LINEAR = {"rope_theta": 1000.0, "rope_type": "linear", "factor": 2.0}
SOURCES = (
    "x = {1: 'a', 22: \"b\", 12345678: None}\r\n\r\n\tif not x:\n        pass"
    "  # DON'T, I'll, it's\n\n\n\nend   ",
    "https://example.org/a_b?c=%20 fooBar FOOBar déjà Ünïcödé русский العربية हिन्दी "
    "日本語の 한국어 😀👍🏽 «–…» ½²³",
)
TEXT = "def main(argv):\n    return 12345, 'it\\'s'  # ünï 😀  <s> \t中文\n\n"


def build(family, **values):
    torch.manual_seed(0)
    return randomise(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | values)), 0.5
    )


def cut(model, removed):
    prunekit.apply_plan(
        model, graph := prunekit.trace(model, example()), prunekit.PruningPlan(removed)
    )
    assert graph
    return model


def everywhere(**units):
    return {
        f"layers.{layer}.{name}": removed for layer in range(3) for name, removed in units.items()
    }


@pytest.fixture(scope="module")
def letters():
    return letter_tokenizer()


def trained(before, **model):
    """A byte-level tokenizer of at most 450 tokens, trained on a module's source."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = before
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SOURCES, inspect.getsource(inspect)], trainer)
    return tokenizer


def sentencepiece(prepended):
    """A tokenizer as transformers makes one of a SentencePiece model: every way to make a token is
    a merge.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    words = sorted(
        {
            word
            for word in inspect.getsource(inspect).replace("\n", " ").split(" ")
            if word.isalpha()
        }
    )[:150]
    pieces = sorted(
        {f"▁{word}"[:end] for word in words for end in range(2, len(word) + 2)},
        key=lambda p: (len(p), p),
    )
    letters = sorted({letter for piece in pieces for letter in piece})
    plain = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate([*plain, *pieces, *letters])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if prepended:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in plain[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return fast(tokenizer, unk_token="<unk>")


def field(file, key):
    return gguf.GGUFReader(file).get_field(key).contents()


@torch.no_grad()
def compare(model, file, ids, length=12):
    """The largest difference of the first token's log-probabilities, ours and llama.cpp's greedy
    continuations.
    """
    expected = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    found, continuation = LlamaCpp(file).complete(ids, length, len(expected))
    assert len(found) == len(expected)
    end, ours = model.config.eos_token_id, list(ids)
    while len(ours) < len(ids) + length and ours[-1] != end:
        ours.append(int(model(input_ids=torch.tensor([ours])).logits[0, -1].argmax()))
    worst = max(abs(expected[index].item() - value) for index, value in found.items())
    without_end = [
        [token for token in tokens if token != end] for tokens in (ours[len(ids) :], continuation)
    ]
    return worst, *without_end


def extra_biases():
    model = build("llama", head_dim=6)
    chosen = ["importance=fluctuation", "compensation=bias", "policy=uniform"]
    prunekit.prune(model, ratio=0.3, calibration=token_ids(8, 12), overrides=chosen)
    assert model.config.extra_biases
    return model


def emptied(model, attention=(), mlp=()):
    """The model without attention and without FFN in these layers."""
    graph = prunekit.trace(model, example())
    layers = {"attention": attention, "mlp": mlp}
    groups = [group for group in graph.groups if group.layer in layers.get(group.kind, ())]
    assert len(groups) == len(attention) + len(mlp)
    return cut(model, {group.name: range(group.num_units) for group in groups})


CASES = {
    "deci-no-attention": ("deci", lambda: emptied(build("llama"), attention=[0, 2])),
    "deci-no-ffn": ("deci", lambda: emptied(build("llama"), mlp=[0, 2])),
    "deci-neither": ("deci", lambda: emptied(build("llama"), attention=[1], mlp=[1])),
    "deci-neither-last": ("deci", lambda: emptied(build("llama"), attention=[2], mlp=[1, 2])),
    "deci-nothing": ("deci", lambda: emptied(build("qwen2"), attention=[0, 1, 2], mlp=[0, 1, 2])),
    "deci-biases-left": ("deci", lambda: emptied(tiny_llama(), attention=[0, 1], mlp=[1, 2])),
    "deci-one-kv-head": (
        "deci",
        lambda: emptied(build("llama", num_key_value_heads=1), attention=[0], mlp=[1]),
    ),
    "openelm-emptied": (
        "openelm",
        lambda: emptied(
            build("qwen3", head_dim=10, tie_word_embeddings=True), attention=[0, 1], mlp=[1, 2]
        ),
    ),
    "deci-widths-and-all-biases": (
        "deci",
        lambda: cut(tiny_llama(), {"layers.0.self_attn": [1], "layers.1.mlp": [0, 3, 7]}),
    ),
    "deci-grouped-wide-heads": (
        "deci",
        lambda: cut(
            build("mistral", head_dim=10, sliding_window=None),
            {"layers.0.self_attn": [1], "layers.1.self_attn.query_head": [0], "layers.2.mlp": [5]},
        ),
    ),
    "deci-qwen2": (
        "deci",
        lambda: cut(build("qwen2"), {"layers.0.self_attn": [0, 2], "layers.2.mlp": [1]}),
    ),
    "deci-scaled-rope": (
        "deci",
        lambda: cut(build("llama", rope_parameters=LLAMA3), {"layers.1.mlp": [1, 2]}),
    ),
    "deci-extra-biases": ("deci", extra_biases),
    "deci-channels": (
        "deci",
        lambda: cut(tiny_llama(), {"channel": [3, 11, 20], "layers.1.self_attn": [3]}),
    ),
    "deci-layer-dropped": ("deci", lambda: cut(tiny_llama(), {"layers": [1], "layers.2.mlp": [3]})),
    "llama-widths": ("llama", lambda: cut(tiny_llama(), everywhere(self_attn=[1], mlp=[2, 4]))),
    "llama-tied-yarn": (
        "llama",
        lambda: build("llama", rope_parameters=YARN, tie_word_embeddings=True),
    ),
    "llama-linear": ("llama", lambda: build("llama", rope_parameters=LINEAR)),
    "llama-narrow-heads": (
        "llama",
        lambda: cut(
            tiny_llama(),
            {"model.layers.head_dim": [1], **everywhere(**{"self_attn.head_dim": [0, 5]})},
        ),
    ),
    "llama-qwen2-without-heads": ("llama", lambda: cut(build("qwen2"), everywhere(self_attn=[1]))),
    "qwen2": (
        "qwen2",
        lambda: cut(build("qwen2", tie_word_embeddings=True), everywhere(mlp=[1, 2])),
    ),
    "qwen3": (
        "qwen3",
        lambda: cut(build("qwen3", head_dim=10), everywhere(self_attn=[1], mlp=[2])),
    ),
    "qwen3-linear": ("qwen3", lambda: build("qwen3", head_dim=10, rope_parameters=LINEAR)),
    "openelm": (
        "openelm",
        lambda: cut(
            build("qwen3", head_dim=10, tie_word_embeddings=True),
            {
                "layers.0.self_attn": [1],
                "layers.1.self_attn.query_head": [1],
                "layers.2.mlp": [5, 6],
            },
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(name, letters, tmp_path):
    architecture, make = CASES[name]
    model = make()
    file = Gguf(dtype="f32").write(model, letters, tmp_path)
    assert field(file, "general.architecture") == architecture
    worst, ours, theirs = compare(model, file, token_ids(1, 20, seed=5)[0].tolist())
    assert worst < 5e-5  # 6e-4 and more without the rotary order, factors or scales
    assert ours == theirs


@pytest.fixture(scope="module")
def demo():
    """The embedded model pruned with its layers' widths apart, and its tokenizer."""
    model = prunekit.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    prunekit.prune(
        model,
        ratio=0.2,
        method="magnitude",
        overrides=["policy=log_increase"],
        calibration=token_ids(8, 16),
    )
    return model, AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.mark.parametrize(
    "dtype, largest", [("f32", 1e-4), ("f16", 0.02), ("bf16", 0.2), ("q8_0", 0.5)]
)
def test_embedded_model_in_every_type(demo, dtype, largest, tmp_path):
    model, tokenizer = demo
    file = Gguf(dtype=dtype).write(model, tokenizer, tmp_path / "new" / "folder")
    worst, ours, theirs = compare(model, file, tokenizer(TEXT).input_ids, 24)
    assert worst < largest
    assert dtype != "f32" or ours == theirs
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds <= {dtype.upper(), "F32", *(["F16"] if dtype == "q8_0" else [])}
    assert [path.name for path in file.parent.iterdir()] == [f"model-{dtype}.gguf"]


def test_a_gguf_file_is_a_model_path(letters, tmp_path):
    """transformers' own reader gives the weights that were written, rotary order and all."""
    model = build("llama")
    file = Gguf(dtype="f32").write(model, letters, tmp_path)
    loaded = prunekit.from_pretrained(file, dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], msg=name)
    assert load_tokenizer(file).vocab_size == letters.vocab_size
    with pytest.raises(CheckpointError, match="no such model folder"):
        prunekit.from_pretrained(tmp_path / "other.gguf")


def test_a_gguf_file_of_eight_bits_is_pruned(demo, tmp_path):
    file = Gguf(dtype="q8_0").write(prunekit.from_pretrained(DEMO_MODEL), demo[1], tmp_path)
    report = prunekit.prune_checkpoint(
        file, tmp_path / "out", ratio=0.2, method="magnitude", overrides=["eval=none"]
    )
    assert report["ratio"]["achieved"] == pytest.approx(0.2, abs=0.01)
    pruned = prunekit.from_pretrained(tmp_path / "out" / "model")
    assert all(parameter.is_floating_point() for parameter in pruned.parameters())


def test_embedded_tokenizer(demo, tmp_path):
    model, tokenizer = demo
    file = Gguf().write(model, tokenizer, tmp_path)
    loaded = LlamaCpp(file)
    sources = [TEXT, "", " ", "a", "  x = [1, 22, 333]\r\n\r\n\tpass", inspect.getsource(json)]
    for text in sources:
        assert loaded.tokens(text) == tokenizer(text).input_ids
    assert field(file, "tokenizer.ggml.pre") == "gpt-2"
    assert loaded.tokens("a<|endoftext|>b") == tokenizer("a<|endoftext|>b").input_ids


def test_sentencepiece_tokenizer_of_a_real_checkpoint(data, tmp_path):
    folder = data / "models" / "stories260K"
    model = prunekit.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cut(model, {"layers.0.self_attn": [1], "layers.3.mlp": list(range(20))})
    file = Gguf(dtype="f32").write(model, tokenizer, tmp_path)
    loaded = LlamaCpp(file)
    lines = (data / "tinystories" / "stories.jsonl").read_text().splitlines()[:20]
    stories = [json.loads(line)["text"] for line in lines]
    for text in [TEXT.replace("<s>", ""), "a", "two  spaces ", "</s>", *stories]:
        assert loaded.tokens(text) == tokenizer(text).input_ids
    worst, ours, theirs = compare(model, file, tokenizer("Once upon a time").input_ids, 32)
    assert worst < 1e-4
    assert ours == theirs


@pytest.mark.parametrize("name", WAYS)
def test_byte_level_tokenizers(name, tmp_path):
    patterns, ignores = WAYS[name]
    backend = trained(build_pretokenizer(patterns), ignore_merges=ignores)
    from tokenizers.processors import TemplateProcessing

    bos = name in ("llama-bpe", "gpt-2")
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = fast(backend, extra_special_tokens=["<|im_end|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = Gguf().write(build("llama", vocab_size=500), tokenizer, tmp_path)
    loaded = LlamaCpp(file)
    for text in [*SOURCES, TEXT, "a<|im_end|>b</s>"]:
        assert loaded.tokens(text) == tokenizer(text).input_ids
    assert field(file, "tokenizer.ggml.pre") == name
    assert field(file, "tokenizer.ggml.add_bos_token") is bos
    assert field(file, "tokenizer.ggml.tokens")[-1] == "[PAD499]"
    assert field(file, "tokenizer.chat_template") == tokenizer.chat_template


@pytest.mark.parametrize("prepended", [True, False])
def test_sentencepiece_tokenizers(prepended, tmp_path):
    tokenizer = sentencepiece(prepended)
    loaded = LlamaCpp(Gguf().write(build("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path))
    for text in [
        *SOURCES,
        TEXT.replace("<s>", ""),
        "import classes  and functions",
        inspect.getsource(inspect)[:5000],
    ]:
        assert loaded.tokens(text) == tokenizer(text).input_ids


def test_unknown_pretokenizer_is_said(tmp_path, capsys):
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    odd = Sequence([Split(Regex("[aeiou]"), "isolated"), ByteLevel(add_prefix_space=False)])
    console.speak()
    try:
        Gguf().write(build("llama", vocab_size=500), fast(trained(odd)), tmp_path)
    finally:
        console.speak(False)
    assert "comes nearest" in capsys.readouterr().out


def test_rotary_order():
    rows = torch.arange(12.0)
    assert rotary_order(rows, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert rotary_order(rows[:, None], 6).shape == (12, 1)


def test_window_ends_the_context(letters, tmp_path):
    file = Gguf().write(build("mistral", sliding_window=16), letters, tmp_path)
    assert field(file, "llama.context_length") == 16


def with_more():
    model = build("llama")
    model.model.layers[1].mlp.gain = torch.nn.Parameter(torch.ones(40))
    return model


def too_large():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    return model


ERRORS = {
    "untied": ("shapes=uniform", lambda: cut(build("qwen3"), {"layers.0.mlp": [1]})),
    "normalised-biases": ("qwen3 loads no biases", lambda: build("qwen3", attention_bias=True)),
    "normalised-rope": (
        "plain or stretched rotary",
        lambda: build("qwen3", head_dim=10, rope_parameters=LLAMA3),
    ),
    "dynamic-rope": (
        "rope_type dynamic",
        lambda: build("llama", rope_parameters=ROPE | {"rope_type": "dynamic"}),
    ),
    "family": (
        "got gpt2",
        lambda: AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt2", vocab_size=97, n_embd=48, n_head=8, n_layer=1)
        ),
    ),
    "activation": ("computes silu", lambda: build("llama", hidden_act="gelu")),
    "range": ("blk.1.ffn_up.weight: NaN or numbers beyond f16", too_large),
    "parameters": ("layers.1.mlp.gain: llama.cpp's llama has no place", with_more),
    "task": ("expected a causal language model", lambda: build("llama").model),
    "rows": ("the embedding has 50 rows", lambda: build("llama", vocab_size=50)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_written_is_an_error_and_leaves_nothing(name, letters, tmp_path):
    words, make = ERRORS[name]
    with pytest.raises(ExportError, match=words):
        Gguf().write(make(), letters, tmp_path / "a" / "b")
    assert not any(tmp_path.iterdir())


def test_files_in_the_way_and_wrong_arguments(letters, tmp_path, monkeypatch):
    model = build("llama")
    file = Gguf().write(model, letters, tmp_path)
    before = file.read_bytes()
    with pytest.raises(ExportError, match="exists already"):
        Gguf().write(model, letters, tmp_path)
    assert file.read_bytes() == before
    with pytest.raises(CheckpointError, match="can't be written"):
        Gguf().write(model, letters, file / "folder")
    with pytest.raises(ExportError, match="did you mean f16"):
        Gguf(dtype="fp16")
    with pytest.raises(ExportError, match="fast tokenizer"):
        Gguf(dtype="f32").write(model, None, tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"pip install prunekit\[gguf\]"):
        Gguf(dtype="f32").write(model, letters, tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_wordpiece_is_an_error(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = fast(
        Tokenizer(models.WordPiece({"<s>": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    )
    with pytest.raises(ExportError, match="got WordPiece"):
        Gguf().write(build("llama"), tokenizer, tmp_path)
