"""Layers as the papers' own models have them, written small: ChatGLM's and Baichuan's attention, an
encoder–decoder.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, token_ids, zero_units
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import prunekit

WIDTH, HEADS, HEAD_DIM = 48, 4, 12


def rotate(x, interleaved):
    """Rotary embedding of x [batch, heads, places, dim], of pairs side by side or half a head
    apart.
    """
    places, dim = x.shape[-2:]
    angle = torch.outer(
        torch.arange(places, device=x.device), 100 ** -torch.arange(0, 1, 2 / dim, device=x.device)
    )
    if interleaved:
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    angle = torch.cat([angle, angle], -1)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


class ChatGLM2Attention(nn.Module):
    """Queries, keys and values in one matrix, two query heads to a key head; rotary on the first
    half of each head.
    """

    def __init__(self, kv_heads=2):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, kv_heads, HEAD_DIM
        self.query_key_value = nn.Linear(WIDTH, (HEADS + 2 * kv_heads) * HEAD_DIM)
        self.dense = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x):
        widths = [
            count * self.head_dim
            for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        ]
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for t in self.query_key_value(x).split(widths, -1)
        )
        q, k = (torch.cat([rotate(t[..., :6], True), t[..., 6:]], -1) for t in (q, k))
        k, v = (
            t.unsqueeze(2)
            .expand(-1, -1, self.num_heads // self.num_kv_heads, -1, -1)
            .reshape(q.shape)
            for t in (k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(out.transpose(1, 2).flatten(2))


class ChatGLMAttention(nn.Module):
    """Each head's query, key and value side by side; scores by hand."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.hidden_size_per_head = HEADS, HEAD_DIM
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        mixed = self.query_key_value(x).view(
            *x.shape[:2], self.num_attention_heads, 3 * self.hidden_size_per_head
        )
        q, k, v = (t.permute(1, 2, 0, 3) for t in mixed.chunk(3, -1))  # [places, heads, batch, dim]
        places, heads, rows, dim = q.shape
        q, k, v = (
            t.permute(1, 2, 0, 3).reshape(heads * rows, places, dim)
            for t in (q.transpose(0, 0), k, v)
        )
        scores = torch.baddbmm(
            torch.zeros(1, 1, 1, device=x.device), q, k.transpose(1, 2), beta=0.0, alpha=0.3
        )
        out = torch.bmm(scores.softmax(-1), v).view(heads, rows, places, dim)
        return self.dense(out.permute(1, 2, 0, 3).flatten(2))


class BaichuanAttention(nn.Module):
    """W_pack: three matrices in one, taken apart by an axis of three."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.hidden_size = HEADS, HEAD_DIM, WIDTH
        self.W_pack = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        packed = (
            self.W_pack(x)
            .unflatten(-1, (3, self.hidden_size))
            .unsqueeze(0)
            .transpose(0, -2)
            .squeeze(-2)
        )
        q, k, v = (
            packed[i].view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for i in range(3)
        )
        scores = rotate(q, False) @ rotate(k, False).transpose(2, 3) * 0.3
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.o_proj(out.reshape(*x.shape[:2], self.hidden_size))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = attention
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(WIDTH, 2 * 40), nn.Linear(40, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        gate, up = self.dense_h_to_4h(self.norm2(x)).chunk(2, -1)
        return x + self.dense_4h_to_h(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.embed, self.layers = (
            nn.Embedding(97, WIDTH),
            nn.ModuleList(Block(attention()) for _ in range(2)),
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 97, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


SEEDS = {
    "ChatGLM2": (
        ChatGLM2Attention,
        {"attention": 2, "query_head": 2, "mlp": 40},
        4 * 12 + 2 * 2 * 12,
    ),
    "ChatGLM2, one key head": (
        lambda: ChatGLM2Attention(1),
        {"attention": 4, "mlp": 40},
        4 * 12 + 2 * 12,
    ),
    "ChatGLM": (ChatGLMAttention, {"attention": 4, "mlp": 40}, 3 * 4 * 12),
    "Baichuan": (BaichuanAttention, {"attention": 4, "mlp": 40}, 3 * 4 * 12),
}


@pytest.mark.parametrize("name", SEEDS)
def test_seeds(name):
    attention, sizes, rows = SEEDS[name]
    model = randomise(Decoder(attention))
    graph = prunekit.trace(model, (token_ids(2, 7),))
    groups = [group for group in graph.groups if group.prunable and group.layer == 1]
    assert {
        group.kind: group.num_units for group in groups if group.exact and group.kind != "head_dim"
    } == sizes
    fused = next(
        m
        for g in groups
        if g.kind == "attention"
        for m in g.members
        if m.dim == 0 and m.index.dim() == 2
    )
    assert graph.shapes[fused.parameter][0] == rows
    removed = {group.name: [0] for group in groups if group.kind in sizes and group.exact}
    masked = zero_units(copy.deepcopy(model), graph, removed)
    pruned = copy.deepcopy(model)
    prunekit.apply_plan(pruned, graph, prunekit.PruningPlan(removed))
    ids = token_ids(3, 9, seed=4)
    torch.testing.assert_close(pruned(ids), masked(ids), rtol=1e-4, atol=1e-4)
    assert (masked(ids) - model(ids)).abs().max() > 0.01


SEQ2SEQ = {
    "t5": {"d_model": 48, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 8},
    "bart": {
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 36,
    },
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_and_decoder(family, attention, tmp_path):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = AutoConfig.for_model(
        family, vocab_size=97, max_position_embeddings=64, **ids, **SEQ2SEQ[family]
    )
    torch.manual_seed(0)
    model = randomise(AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention))
    inputs = {"input_ids": token_ids(2, 7), "decoder_input_ids": token_ids(2, 5, seed=1)}
    graph = prunekit.trace(model, inputs)
    groups = [
        group
        for group in graph.groups
        if group.prunable and group.exact and group.kind in ("attention", "mlp")
    ]
    sizes = sorted(group.num_units for group in groups)
    # T5's bias table ties the heads of all layers of a stack. The mask that its cross-attention
    # hands to sdpa is as wide as the heads are.
    crossing = [8] if attention == "eager" else []
    assert sizes == (
        [8, 8, *crossing, 40, 40, 40, 40] if family == "t5" else [4, 4, 4, 4, 8, 8, 36, 36, 40, 40]
    )
    removed = {group.name: [1, 2] for group in groups}
    masked = zero_units(copy.deepcopy(model), graph, removed)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    inputs = {"input_ids": token_ids(3, 6), "decoder_input_ids": token_ids(3, 4, seed=1)}
    with torch.no_grad():
        logits, expected = (m(**inputs, use_cache=False).logits for m in (model, masked))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    source = inputs["input_ids"]
    assert torch.equal(
        model.generate(source, **settings), masked.generate(source, use_cache=False, **settings)
    )
    prunekit.save_pretrained(model, tmp_path / "model")
    loaded = prunekit.from_pretrained(tmp_path / "model", attn_implementation=attention)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs, use_cache=False).logits, logits)
