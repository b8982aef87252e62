"""A third model for the quality tables: a GPT-2 (Conv1D, biases, LayerNorm) trained on the embedded
corpus.

python benchmarks/small_gpt2.py FOLDER       # some ten minutes on one CPU core
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from prunekit.demo.train import (
    TrainingConfig,
    draw_batch,
    encode_corpus,
    heldout_loss,
    lr_scale,
    make_optimizers,
    train_tokenizer,
)

CONFIG = TrainingConfig(
    vocab_size=1024, hidden_size=128, layers=6, steps=1500, sequence_length=128, dropout=0.0
)


def build(eos: int) -> GPT2LMHeadModel:
    torch.manual_seed(CONFIG.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=CONFIG.vocab_size,
            n_embd=CONFIG.hidden_size,
            n_layer=CONFIG.layers,
            n_head=CONFIG.heads,
            n_positions=1024,
            bos_token_id=eos,
            eos_token_id=eos,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def main() -> None:
    output = Path(sys.argv[1])
    tokenizer = train_tokenizer(CONFIG.vocab_size)
    tokens, windows = encode_corpus(tokenizer)
    model = build(tokenizer.eos_token_id)
    optimizers = make_optimizers(model, CONFIG)
    sizes = [[CONFIG.matrix_lr], [CONFIG.embedding_lr] * 2]
    for step in range(CONFIG.steps):
        for optimizer, rates in zip(optimizers, sizes, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * lr_scale(step, CONFIG)
        batch = draw_batch(tokens, step, CONFIG)
        logits = model(batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    print(f"held-out perplexity {math.exp(heldout_loss(model, windows, 'cpu')):.2f}", flush=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
