"""Sample sentences, greedy and drawn, so that a person can see what the figures mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prunekit.errors import ConfigError
from prunekit.model.inputs import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPERS = (  # appendix E of both papers
    "AI can create a logo in seconds",
    "Neural Sequential Model, especially transformers,",
    "What's great about the holiday season,",
)


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt, the mode of its continuation, and the prompt with its continuation."""

    prompt: str
    mode: str
    text: str

    def to_json(self) -> dict[str, Any]:
        """The sample in JSON's types."""
        return {"prompt": self.prompt, "mode": self.mode, "text": self.text}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the next token is chosen.

    Attributes:
        temperature: of the softmax that tokens are drawn from; 0: the likeliest token is taken.
        top_p: tokens are drawn from the likeliest ones that make up this share.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        if not self.temperature:
            return "greedy"
        return f"sampled, temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"


def expand_prompts(given: Sequence[str]) -> list[str]:
    """The prompts, with the three prompts of the papers in place of "papers"."""
    prompts: list[str] = []
    for prompt in given:
        prompts += PAPERS if prompt == "papers" else [prompt]
    return prompts


def check_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, longest: int | None = None
) -> None:
    """Raise ConfigError where a prompt has no token, or leaves no room for another one."""
    tokens = len(tokenizer(prompt)["input_ids"])
    if not 0 < tokens < (longest or tokens + 1):
        most = f" to {longest - 1}" if longest else " or more"
        raise ConfigError(
            f"eval.prompts: expected prompts of 1{most} tokens, got {tokens}: {prompt[:40]!r}"
        )


@torch.inference_mode()
def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int,
    *,
    drawing: Drawing | None = None,
    device: torch.device | str | None = None,
    longest: int | None = None,
) -> str:
    """The prompt and its continuation by up to `new_tokens` tokens.

    Args:
        model: a causal language model of transformers.
        tokenizer: the tokenizer of the model.
        prompt: the text to continue.
        new_tokens: how many tokens follow at most.
        drawing: how tokens are chosen, greedily by default; the random generators are left as they
            were.
        device: where inputs go; by default where the model wants them.
        longest: the most tokens of prompt and continuation; None: no limit.
    """
    drawing = drawing or Drawing()
    ids: Any = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"]
    ids = ids.to(input_device(model) if device is None else device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options: dict[str, Any] = {"do_sample": False}
    if drawing.temperature:
        options = {
            "do_sample": True,
            "temperature": drawing.temperature,
            "top_p": drawing.top_p,
            "top_k": 0,
        }
    room = (longest or ids.shape[1] + new_tokens) - ids.shape[1]
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        torch.manual_seed(drawing.seed)
        generate: Any = model.generate
        out = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(new_tokens, room),
            pad_token_id=pad,
            **options,
        )
    text: Any = tokenizer.decode(out[0], skip_special_tokens=True)
    return text
