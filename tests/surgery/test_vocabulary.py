"""Rows of embedding and head are cut: logits of what is left are the same, ids are counted anew."""

import copy

import pytest
import torch
from conftest import tiny_llama
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

import prunekit
from prunekit.errors import SurgeryError
from prunekit.surgery.vocabulary import cut_vocabulary, special_ids

KEPT = torch.tensor([0, 1, 5, 6, 11, 40, 41, 90, 96])


def gemma():
    config = GemmaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=11,
    )  # fmt: skip
    torch.manual_seed(0)
    return GemmaForCausalLM(config).eval()


def gpt2():
    config = GPT2Config(
        vocab_size=97, n_embd=16, n_layer=2, n_head=2, bos_token_id=90, eos_token_id=90
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


SIZES = {"vocab_size": 97, "encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def bart():
    more = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**SIZES, **HEADS, **more)).eval()
    model.final_logits_bias.normal_()
    return model


def classifier():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=97, intermediate_size=24, num_labels=5, **sizes)
    ).eval()


def logits_of(model, ids):
    both = {"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **both).logits


MODELS = {
    "tied": lambda: tiny_llama(tied=True),
    "untied": lambda: tiny_llama(tied=False),
    "scaled": gemma,
    "gpt2": gpt2,
    "encoder and decoder": bart,
    "classifier": classifier,
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_logits_of_what_is_left_are_the_same(build, tmp_path):
    model = build()
    kept = torch.tensor(sorted(set(KEPT.tolist()) | special_ids(model)))
    new = torch.randint(len(kept), (3, 10), generator=torch.Generator().manual_seed(1))
    expected = logits_of(model, kept[new])
    expected = expected if build is classifier else expected[..., kept]
    cut_vocabulary(model, kept)
    assert torch.allclose(logits_of(model, new), expected, rtol=1e-5, atol=1e-6)
    assert model.config.vocab_size == len(kept)
    prunekit.save_pretrained(model, tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(again, new), logits_of(model, new))
    assert again(input_ids=new, labels=new[:, 0] % 5 if build is classifier else new).loss > 0


def test_ids_in_the_configs_are_counted_anew():
    model = gemma()
    model.generation_config.suppress_tokens = [5, 7]
    model.generation_config.eos_token_id = [1, 96]
    cut_vocabulary(model, torch.tensor([0, 1, 2, 5, 11, 96]))
    assert model.config.pad_token_id == 4
    assert model.get_input_embeddings().padding_idx == 4
    assert model.generation_config.eos_token_id == [1, 5]
    assert model.generation_config.suppress_tokens == [3]
    ids = model.generate(torch.tensor([[0, 3, 4]]), max_new_tokens=3, do_sample=False)
    assert int(ids.max()) < 6


def test_a_special_id_that_would_go_is_refused():
    with pytest.raises(SurgeryError, match="expected special ids to stay, \\{1\\} would go"):
        cut_vocabulary(tiny_llama(), torch.tensor([0, 2, 3]))


def test_a_model_that_reads_ids_elsewhere_is_put_back():
    """A bias for each token, which is neither the embedding's nor the head's."""
    model = tiny_llama()
    model.register_buffer("bias_of_tokens", torch.randn(97))
    plain = type(model).forward

    class Biased(type(model)):
        def forward(self, *args, **kwargs):
            outputs = plain(self, *args, **kwargs)
            width = outputs.logits.shape[-1]
            outputs.logits = outputs.logits + self.bias_of_tokens[:width]
            return outputs

    model.__class__ = Biased
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(SurgeryError, match="something beside the embedding and the head"):
        cut_vocabulary(model, KEPT)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config
    assert model.lm_head.out_features == 97
