"""A tokenizer, corpora and tiny models for the recovery's tests."""

import copy
import json

import torch
from conftest import tiny_llama, token_ids
from transformers import GPT2Config, GPT2LMHeadModel

import prunekit
from prunekit.recovery import Recovery, recover


class Letters:
    """A tokenizer of single characters: 0 begins, 1 ends."""

    eos_token_id = 1
    pad_token_id = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        return {"input_ids": [0] * add_special_tokens + [2 + ord(c) % 90 for c in text]}


def tiny_gpt2(seed=0):
    sizes = {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config).eval()


def pruned(model):
    """The model with whole heads and MLP units gone, other numbers in every layer."""
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    cut = {
        g.name: list(range(1 + (g.layer or 0)))
        for g in graph.groups
        if g.kind in ("attention", "mlp")
    }
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(cut))
    return model


def small(seed=0, **kwargs):
    """A Llama with gentle weights, so that a few steps of training do what they should."""
    model = tiny_llama(layers=2, seed=seed, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model


def texts(folder, count=24):
    """A file of short documents of two alternating letters."""
    path = folder / "texts.jsonl"
    lines = ["ab" * (5 + i % 7) + "cd" * (i % 5) for i in range(count)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return str(path)


def settings(path, **kwargs):
    values = {"path": path, "join": False, "length": 24, "epochs": 2, "holdout": 4, "dropout": 0.0}
    values |= {"batch_size": 4, "micro_batch": 4, "learning_rate": 3e-3, "evaluations": 2}
    return Recovery(**(values | kwargs))


def run(model, recovery, folder, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    result = recover(model, Letters(), recovery, known={}, seed=0, folder=folder, **kwargs)
    return result.to_json()


def clone(model):
    return copy.deepcopy(model)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids, use_cache=False).logits
