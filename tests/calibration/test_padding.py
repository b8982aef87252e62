"""What padded batches give, against one's own hooks on the model, called as it is given."""

import copy

import pytest
import torch
import transformers
from conftest import tiny_llama, token_ids
from torch import nn

import prunekit
from prunekit.calibration.activations import gather_input_statistics
from prunekit.calibration.padding import remove_padding
from prunekit.calibration.walk import Walk
from prunekit.data.batches import make_batches
from prunekit.errors import DataError
from prunekit.graph import trace


def watch(model, paths, batch):
    """The inputs [B, T, n] of modules, in the padded call."""
    seen = {}
    with torch.no_grad():
        for path in paths:

            def note(_, args, path=path):
                seen[path] = args[0].clone()

            model.get_submodule(path).register_forward_pre_hook(note)
        model(**batch)
    return seen


def mask_of(kept, length):
    """A mask [B, T] with so many tokens of each sample, the last sample's on the right."""
    mask = (torch.arange(length) < torch.tensor(kept)[:, None]).long()
    mask[-1] = mask[-1].flip(0)
    return mask


def test_each_side_of_an_encoder_decoder_has_its_own_padding():
    """The samples of both sides may be as long, and must not be taken for one another's."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    config = transformers.T5Config(**sizes, num_layers=1, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    masks = {"encoder": mask_of([8, 3, 3, 5], 8), "decoder": mask_of([2, 8, 4, 6], 8)}
    batch = {
        "input_ids": token_ids(4, 8),
        "attention_mask": masks["encoder"],
        "decoder_input_ids": token_ids(4, 8).flip(0),
        "decoder_attention_mask": masks["decoder"],
        "use_cache": False,
    }
    (made,) = make_batches(model, batch["input_ids"], 4, torch.device("cpu"))
    expected = torch.cat([torch.zeros(4, 1).long(), made["input_ids"][:, :-1]], 1)
    assert torch.equal(made["decoder_input_ids"], expected)  # of token ids alone
    graph = trace(model, {name: value[:2] for name, value in batch.items() if name != "use_cache"})
    groups = [group for group in graph.groups if group.kind == "mlp"]
    paths = [group.consumers[0].parameter.removesuffix(".weight") for group in groups]
    statistics = gather_input_statistics(model, [f"{path}.weight" for path in paths], [batch])
    walk = Walk(model=model, groups=groups, batches=[batch])
    found = [site.moments for _, (site,) in walk]
    watched = watch(copy.deepcopy(model), paths, batch)
    for path, moments in zip(paths, found, strict=True):
        x = watched[path][masks[path.partition(".")[0]].bool()]
        assert moments.tokens == len(x)
        torch.testing.assert_close(moments.hessian, x.T @ x / len(x))
        torch.testing.assert_close(statistics[f"{path}.weight"].norm(), x.norm(dim=0))


def test_torchs_own_encoder_is_repaired_on_the_tokens_that_it_does_not_mask():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 1).double().eval()
    x, padding = torch.randn(12, 9, 16).double(), ~mask_of([9, 4, 7] * 4, 9).bool()
    batch = {"src": x, "src_key_padding_mask": padding}
    options = ["compensation.target=pruned", "schedule.damping=0", "policy=uniform"]
    done = prunekit.prune(copy.deepcopy(dense), calibration=[batch], overrides=options)
    assert done.model.use_nested_tensor
    (removed,) = done.plan.removed.values()
    kept = [unit for unit in range(32) if unit not in removed]
    with torch.no_grad():  # by hand
        first = dense.layers[0]
        attended, _ = first.self_attn(x, x, x, key_padding_mask=padding, need_weights=True)
        hidden = first.linear1(first.norm1(x + attended)).relu()[~padding]
        weight = first.linear2.weight
        best = torch.linalg.lstsq(hidden[:, kept], hidden @ weight.T).solution.T
    torch.testing.assert_close(done.model.layers[0].linear2.weight.data, best)


def test_rows_with_the_same_padding_stay_together():
    ids, mask = token_ids(5, 6), mask_of([6, 6, 4, 0, 5], 6)
    batch = {
        **{"input_ids": ids, "attention_mask": mask, "use_cache": False},
        **{"position_ids": torch.arange(18).view(3, 1, 6).expand(3, 5, 6), "labels": ids[:, 0]},
        **{"pixel_values": torch.randn(5, 6, 2), "scale": torch.tensor(2.0)},
    }
    first, second, third = remove_padding(tiny_llama(layers=1), [batch])
    for made, rows, span in (
        (first, slice(0, 2), slice(0, 6)),
        (second, slice(2, 3), slice(0, 4)),
        (third, slice(4, 5), slice(1, 6)),
    ):
        assert torch.equal(made["input_ids"], ids[rows, span])
        assert made["attention_mask"].all()
        assert torch.equal(made["position_ids"], batch["position_ids"][:, rows, span])
        assert torch.equal(made["labels"], ids[rows, 0])
        assert torch.equal(made["pixel_values"], batch["pixel_values"][rows])
        assert made["scale"] is batch["scale"] and made["use_cache"] is False
    whole = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    assert remove_padding(tiny_llama(layers=1), whole)[0] is whole[0]


class Masked(nn.Module):
    """Per token, or mixed; what the mask is true at counts for nothing."""

    def __init__(self, mixes):
        super().__init__()
        self.linear, self.mixes = nn.Linear(4, 3), mixes

    def forward(self, x, attention_mask):
        x = x.masked_fill(attention_mask.bool()[..., None], 0)
        return self.linear(x + x.sum(1, keepdim=True) if self.mixes else x)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_mask_that_means_the_opposite_is_refused(mixes):
    model, mask = Masked(mixes), mask_of([6, 6, 4, 1, 5], 6)
    with pytest.raises(DataError, match="attention_mask: expected 1 at tokens and 0 at padding"):
        remove_padding(model, [{"x": torch.randn(5, 6, 4), "attention_mask": 1 - mask}])
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": 1 - kwargs["attention_mask"]}),
        with_kwargs=True,
    )
    assert len(remove_padding(model, [{"x": torch.randn(5, 6, 4), "attention_mask": mask}])) == 4


@pytest.mark.parametrize(
    ("own", "change", "message"),
    [
        (False, {"attention_mask": torch.eye(5, 6) + torch.eye(5, 6).roll(2)}, "some between"),
        (False, {"attention_mask": torch.zeros(5, 6)}, "nothing but padding"),
        (False, {"pixel_values": torch.ones(3, 2)}, r"pixel_values: .* 5 padded samples, got \[3"),
        (True, {"target": torch.ones(5, 6)}, "attention_mask .* isn't clear among input_ids, att"),
        (True, {"input_ids": token_ids(6, 5)}, "whose padding"),  # time first, perhaps
    ],
)
def test_padding_that_can_not_be_removed_is_refused(own, change, message):
    batch = {"input_ids": token_ids(5, 6), "attention_mask": mask_of([6, 6, 4, 1, 5], 6), **change}
    with pytest.raises(DataError, match=message):
        remove_padding(nn.Identity() if own else tiny_llama(layers=1), [batch])
