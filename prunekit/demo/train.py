"""Train the embedded model from nothing: `python -m prunekit.demo.train`.

Llama architecture, byte-level BPE, the embedded corpus; Muon for the matrices, AdamW for the
embedding and the norms; warm-up, then a linear decay to zero. Killed anywhere, the same command
goes on from the last checkpoint.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunekit.data import embedded

END_OF_TEXT = "<|endoftext|>"
WINDOW = 128  # tokens of an evaluation window


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything the result depends on; stored with every checkpoint."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 640
    layers: int = 8
    heads: int = 8
    steps: int = 2600
    batch_size: int = 32
    sequence_length: int = 256
    warmup_steps: int = 100
    matrix_lr: float = 3e-3
    embedding_lr: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    seed: int = 0


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, learnt on the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in embedded.documents("train")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def encode_corpus(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """The training tokens [T], documents joined by the end-of-text token, and the held-out windows
    [N, WINDOW].
    """
    train: list[int] = []
    for _, text in embedded.documents("train"):
        train += [*tokenizer.encode(text), tokenizer.eos_token_id]
    heldout = tokenizer.encode("\n\n".join(text for _, text in embedded.documents("heldout")))
    windows = torch.tensor(heldout[: len(heldout) // WINDOW * WINDOW]).view(-1, WINDOW)
    return torch.tensor(train), windows


def build_model(config: TrainingConfig, eos: int) -> LlamaForCausalLM:
    """The untrained Llama, float32, with dropout on every block's output while training."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(  # type: ignore[call-arg]
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=eos,
            eos_token_id=eos,
            attn_implementation="eager",  # twice as fast as the fused kernel at these sizes on CPU
        )
    )
    for layer in model.model.layers:
        for block in (layer.self_attn.o_proj, layer.mlp.down_proj):
            block.register_forward_hook(
                lambda module, _, out: F.dropout(out, config.dropout, module.training)
            )
    return model


def yardsticks(train: Tensor, windows: Tensor, vocab: int) -> dict[str, float]:
    """Perplexities of a unigram and of an interpolated bigram model on the tokens the language
    model is scored on.

    P(w|v) = λ·c(v,w)/c(v) + (1−λ)·P(w), with the λ that suits the held-out text best and add-one
    unigrams.
    """
    unigram = torch.bincount(train, minlength=vocab).double() + 1
    unigram /= unigram.sum()
    pairs = (
        torch.bincount(train[:-1] * vocab + train[1:], minlength=vocab * vocab)
        .double()
        .view(vocab, vocab)
    )
    bigram = pairs / pairs.sum(1, keepdim=True).clamp_min(1)
    previous, current = windows[:, :-1].flatten(), windows[:, 1:].flatten()
    p1, p2 = unigram[current], bigram[previous, current]
    losses = [
        -(lam * p2 + (1 - lam) * p1).log().mean().item() for lam in torch.linspace(0.5, 0.99, 50)
    ]
    return {"unigram": math.exp(-p1.log().mean().item()), "bigram": math.exp(min(losses))}


@torch.inference_mode()
def heldout_loss(model: nn.Module, windows: Tensor, device: str) -> float:
    """Mean next-token loss over the windows, in float32."""
    model.eval()
    total = 0.0
    for batch in windows.split(32):
        batch = batch.to(device)
        logits = model(batch).logits[:, :-1].float()
        total += F.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return total / (windows.numel() - len(windows))


def make_optimizers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding (decayed) and the norms
    (not).
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(
            matrices,
            lr=config.matrix_lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [{"params": embeddings}, {"params": norms, "weight_decay": 0.0}],  # type: ignore[arg-type]
            lr=config.embedding_lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        ),
    ]


def lr_scale(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min(
        (step + 1) / config.warmup_steps,
        (config.steps - step) / (config.steps - config.warmup_steps),
    )


def draw_batch(train: Tensor, step: int, config: TrainingConfig) -> Tensor:
    """The batch [B, T] of a step: a function of seed and step alone, so that a resumed run sees the
    same data.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    starts = torch.randint(
        len(train) - config.sequence_length, (config.batch_size, 1), generator=generator
    )
    return train[starts + torch.arange(config.sequence_length)]


def save_checkpoint(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict
) -> None:
    """Write weights and optimizer moments as safetensors with `state` in the header; atomic."""
    tensors = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters()}
    for o, optimizer in enumerate(optimizers):
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{k}": v.clone() for k, v in moments.items()}
    save_file(tensors, path.with_suffix(".tmp"), {"state": json.dumps(state)})
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], config: dict
) -> dict:
    """Restore what `save_checkpoint` wrote; the run's state comes back."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    if state["config"] != config:
        raise SystemExit(
            f"{path} belongs to another configuration: {state['config']}; delete it to start anew"
        )
    tensors = load_file(path)
    model.load_state_dict(
        {n: tensors[f"model.{n}"] for n, _ in model.named_parameters()}, strict=False
    )
    for o, optimizer in enumerate(optimizers):
        restored = optimizer.state_dict()
        for key, value in tensors.items():
            kind, *rest = key.split(".")
            if kind == "optimizer" and rest[0] == str(o):
                restored["state"].setdefault(int(rest[1]), {})[rest[2]] = value
        optimizer.load_state_dict(restored)
    return state


def train(config: TrainingConfig, output: Path, device: str, every: int) -> None:
    """Run or resume the training; leave the best model, its tokenizer and its card in `output`.

    Args:
        config: what the result depends on.
        output: a folder; checkpoints lie in `output/training`.
        device: where the model is trained.
        every: steps between evaluations and checkpoints.
    """
    work = output / "training"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(config.vocab_size)
    tokens, windows = encode_corpus(tokenizer)
    model: Any = build_model(config, tokenizer.eos_token_id)
    model.to(device)
    optimizers = make_optimizers(model, config)
    state = begin_or_resume(config, work / "last.safetensors", model, optimizers)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(tokens):,} training tokens, {windows.numel():,} held-out tokens, "
        f"{config.steps} steps",
        flush=True,
    )
    began, seen = time.perf_counter(), 0
    for step in range(state["step"], config.steps):
        batch = draw_batch(tokens, step, config).to(device)
        loss = train_step(config, step, model, optimizers, batch)
        seen += batch.numel()
        if (step + 1) % 20 == 0:
            rate = seen / (time.perf_counter() - began)
            print(
                f"step {step + 1}/{config.steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % every == 0 or step + 1 == config.steps:
            heldout = heldout_loss(model, windows, device)
            keep_checkpoints(work, step + 1, heldout, model, optimizers, state)
    finish(config, output, tokenizer, tokens, windows)


def begin_or_resume(
    config: TrainingConfig, last: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """The state of a run: a new one, or what its last checkpoint says, which is then restored.

    It holds `config`, `step` (finished ones), `best` (held-out loss), `best_step` and `history`
    (pairs of step and held-out loss).
    """
    if last.exists():
        state = load_checkpoint(last, model, optimizers, asdict(config))
        print(f"resumed at step {state['step']}")
        return state
    begun = {"step": 0, "best": float("inf"), "best_step": 0, "history": []}
    return {"config": asdict(config), **begun}


def train_step(
    config: TrainingConfig,
    step: int,
    model: Any,
    optimizers: list[torch.optim.Optimizer],
    batch: Tensor,
) -> Tensor:
    """One step of all optimizers on token ids [B, T]; returns the mean next-token loss."""
    rates = [[config.matrix_lr], [config.embedding_lr] * 2]  # [optimizer][group of parameters]
    for optimizer, own in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate * lr_scale(step, config)
    torch.manual_seed(config.seed * 1_000_003 + step)  # the dropout masks of this step
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(batch).logits[:, :-1]
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def keep_checkpoints(
    work: Path,
    step: int,
    heldout: float,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
) -> None:
    """Note the held-out loss after `step` steps in `state`; write the last checkpoint, and the
    best where this is it.
    """
    state["history"].append([step, heldout])
    state["step"] = step
    print(f"step {step}  held-out perplexity {math.exp(heldout):.2f}", flush=True)
    if heldout < state["best"]:
        state |= {"best": heldout, "best_step": step}
        save_checkpoint(work / "best.safetensors", model, [], state)
    save_checkpoint(work / "last.safetensors", model, optimizers, state)


def finish(
    config: TrainingConfig,
    output: Path,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Tensor,
    windows: Tensor,
) -> None:
    """Write the best checkpoint as a float16 Hugging Face folder, with its card."""
    model: Any = build_model(config, tokenizer.eos_token_id)
    state = load_checkpoint(output / "training" / "best.safetensors", model, [], asdict(config))
    model.half()
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    figures = {
        "perplexity": math.exp(heldout_loss(model.float(), windows, "cpu")),
        **yardsticks(tokens, windows, config.vocab_size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": len(tokens),
        "heldout_tokens": windows.numel(),
    }
    (output / "card.json").write_text(
        json.dumps({"config": asdict(config), **figures, **state}, indent=1) + "\n"
    )
    (output / "README.md").write_text(card(config, figures, state))
    print((output / "README.md").read_text())


def card(config: TrainingConfig, figures: dict, state: dict) -> str:
    """The model card, as Markdown."""
    shape = (
        f"{config.layers} layers, {config.heads} heads, hidden {config.hidden_size}, "
        f"FFN {config.intermediate_size}"
    )
    vocabulary = f"byte-level BPE of {config.vocab_size:,} tokens"
    epochs = (
        state["best_step"] * config.batch_size * config.sequence_length / figures["training_tokens"]
    )
    steps = (
        f"{state['best_step']:,} of {config.steps:,}, "
        f"{config.batch_size} × {config.sequence_length} tokens each"
    )
    table = {
        "corpus": f"the standard library of Python {platform.python_version()}: "
        "module sources and `pydoc` topics; no tests, no `encodings`",
        "split": f"by SHA-256 of the document's name, one in {embedded.HELDOUT_SHARE} held out",
        "training tokens": f"{figures['training_tokens']:,}",
        "steps": f"{steps} ({epochs:.1f} epochs)",
        "seed": f"{config.seed}",
        "held-out perplexity": f"**{figures['perplexity']:.2f}** "
        f"({figures['heldout_tokens']:,} tokens, windows of {WINDOW})",
        "interpolated bigram, same tokens": f"{figures['bigram']:.2f}",
        "unigram, same tokens": f"{figures['unigram']:.2f}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in table.items())
    return f"""# The embedded model

A Llama of {figures["parameters"]:,} parameters ({shape}, {vocabulary}), float16,
made by `python -m prunekit.demo.train`.

| | |
|---|---|
{rows}

The text of the standard library is under the Python Software Foundation License.
"""


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = TrainingConfig()
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--every", type=int, default=250, help="steps between evaluations and checkpoints"
    )
    options = vars(parser.parse_args())
    output, device, every = (options.pop(k) for k in ("output", "device", "every"))
    train(TrainingConfig(**options), output, device, every)


if __name__ == "__main__":
    main()
