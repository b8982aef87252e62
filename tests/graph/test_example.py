"""Examples of batches: whole samples, shortened where they are plain text, without labels."""

import copy

import pytest
import torch
from conftest import tiny_llama, token_ids
from torch import nn
from transformers import LayoutLMConfig, LayoutLMForTokenClassification

import prunekit
from prunekit.errors import TraceError
from prunekit.graph.example import examples_of, trace_batch


def shapes(example):
    return {k: tuple(v.shape) for k, v in example.items() if isinstance(v, torch.Tensor)}


def test_text_is_shortened_and_its_labels_are_left_out():
    ids = token_ids(5, 20)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    first, *_ = examples_of(tiny_llama(layers=1), batch)
    assert shapes(first) == {"input_ids": (2, 8), "attention_mask": (2, 8)}
    assert torch.equal(first["input_ids"], ids[:2, :8])


def test_padding_is_passed_over():
    ids, mask = token_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[:, :11] = 0
    first, *_ = examples_of(tiny_llama(layers=1), {"input_ids": ids, "attention_mask": mask})
    assert first["attention_mask"].all()
    assert torch.equal(first["input_ids"], ids[:2, 11:19])


def test_a_lone_sample_is_taken_twice_and_what_has_no_samples_stays():
    batch = {"x": torch.randn(1, 4), "scale": torch.randn(7, 4), "flag": True}
    (example,) = examples_of(nn.Linear(4, 4), batch | {"y": torch.randn(1, 3)})
    assert shapes(example) == {"x": (2, 4), "y": (2, 3), "scale": (7, 4)}
    assert example["flag"] is True


class Table(nn.Module):
    """Categorical columns, of a fixed number; its loss can be asked for."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 4), nn.Linear(48, 32), nn.Linear(32, 2)

    def forward(self, input_ids, labels=None):
        out = self.down(self.up(self.embed(input_ids).flatten(1)).relu())
        return out if labels is None else ((out.sum(-1) - labels) ** 2).mean()


class Loss(Table):
    """Gives nothing but a loss."""

    def forward(self, input_ids, labels=None):
        return super().forward(input_ids, labels + 0)


@pytest.mark.parametrize("build", [Table, Loss])
def test_what_does_not_run_on_less_is_traced_with_more(build):
    model = build().eval()
    batch = {"input_ids": torch.randint(0, 20, (6, 12)), "labels": torch.randn(6)}
    graph = trace_batch(model, batch)
    expected = {"input_ids": (2, 12), "labels": (2,)}
    assert shapes(graph.example_inputs) == {
        name: shape for name, shape in expected.items() if build is Loss or name != "labels"
    }
    assert any(group.num_units == 32 and group.prunable for group in graph.groups)
    with pytest.raises(TraceError):
        trace_batch(model, {"input_ids": torch.randint(0, 20, (6, 13))})


class Nodes(nn.Module):
    """Of a graph: x [nodes, 5], and who is beside whom [nodes, nodes]."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x, beside):
        return self.down(beside @ self.up(x).relu())


@pytest.mark.parametrize("method", ["magnitude", "slimgpt"])
def test_what_has_no_samples_is_traced_as_it_is(method):
    dense = Nodes()
    batch = {"x": torch.randn(12, 5), "beside": torch.rand(12, 12)}
    options = ["compensation=none"] if method == "slimgpt" else []
    done = prunekit.prune(
        copy.deepcopy(dense), ratio=0.2, method=method, calibration=[batch], overrides=options
    )
    (removed,) = done.plan.removed.values()
    dense.down.weight.data[:, list(removed)] = 0
    torch.testing.assert_close(done.model(**batch), dense(**batch))


def test_a_model_of_documents_is_pruned_with_its_boxes():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40}
    more = {"vocab_size": 97, "num_hidden_layers": 2, "max_2d_position_embeddings": 128}
    model = LayoutLMForTokenClassification(LayoutLMConfig(**sizes, **more)).eval()
    corners = torch.randint(0, 100, (4, 16, 2))
    batch = {"input_ids": token_ids(4, 16), "bbox": torch.cat([corners, corners + 5], -1)}
    result = prunekit.prune(model, ratio=0.1, method="magnitude", calibration=[batch])
    assert result.report["ratio"]["achieved"] == pytest.approx(0.1, abs=0.02)
    assert model(**batch).logits.shape == (4, 16, 2)


@pytest.mark.parametrize(
    "more",
    [
        {"labels": torch.cat([torch.full((4, 12), -100), token_ids(4, 8)], 1)},
        {"attention_mask": torch.ones(20, 20).tril().bool().expand(4, 1, 20, 20)},
        {"inputs_embeds": torch.randn(4, 20, 48), "input_ids": None},
    ],
    ids=["prompts without labels", "packed rows", "embeddings"],
)
@pytest.mark.parametrize("method", ["magnitude", "slimgpt"])
def test_batches_of_every_kind_are_pruned_with(more, method):
    batch = {"input_ids": token_ids(4, 20)} | more
    batch = {name: value for name, value in batch.items() if value is not None}
    result = prunekit.prune(
        tiny_llama(layers=2),
        ratio=0.1,
        method=method,
        calibration=[batch],
        overrides=["policy=uniform"],
    )
    assert result.report["ratio"]["achieved"] == pytest.approx(0.1, abs=0.02)
