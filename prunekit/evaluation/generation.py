"""Sample sentences, greedy, so that a person can see what the figures mean."""

from typing import Any

import torch


@torch.inference_mode()
def continuation(
    model: Any, tokenizer: Any, prompt: str, new_tokens: int, device: torch.device | str | None = None
) -> str:
    """The prompt and its greedy continuation; inputs go to `device`, where the weights are by default."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"]
    ids = ids.to(model.device if device is None else device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)
