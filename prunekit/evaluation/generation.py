"""Sample sentences, greedy and drawn, so that a person can see what the figures mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunekit.errors import ConfigError
from prunekit.model.inputs import input_device

PAPERS = (  # appendix E of both papers
    "AI can create a logo in seconds",
    "Neural Sequential Model, especially transformers,",
    "What's great about the holiday season,",
)


def prompts_of(given: Sequence[str]) -> list[str]:
    """The prompts, with "papers" standing for the three of the papers."""
    return [text for prompt in given for text in (PAPERS if prompt == "papers" else (prompt,))]


def check_prompt(prompt: str, tokenizer: Any, longest: int | None = None) -> None:
    """Raise ConfigError where a prompt has no token, or leaves no room for another."""
    tokens = len(tokenizer(prompt)["input_ids"])
    if not 0 < tokens < (longest or tokens + 1):
        most = f" to {longest - 1}" if longest else " or more"
        raise ConfigError(
            f"eval.prompts: expected prompts of 1{most} tokens, got {tokens}: {prompt[:40]!r}"
        )


@torch.inference_mode()
def continuation(
    model: Any,
    tokenizer: Any,
    prompt: str,
    new_tokens: int,
    device: torch.device | str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    longest: int | None = None,
) -> str:
    """The prompt and its continuation by up to `new_tokens` tokens.

    Args:
        model: a causal language model of transformers.
        tokenizer: its.
        prompt: what is continued.
        new_tokens: at most.
        device: where inputs go; by default where the model wants them.
        temperature: of the softmax that tokens are drawn from; 0: the likeliest token is taken.
        top_p: they are drawn from the likeliest that make up this share.
        seed: of the draws; the generators are left as they were.
        longest: tokens the model was made for, where it says so: no more are made.
    """
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"]
    ids = ids.to(input_device(model) if device is None else device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(new_tokens, (longest or ids.shape[1] + new_tokens) - ids.shape[1]),
            do_sample=bool(temperature),
            pad_token_id=pad,
            **drawn,
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)
