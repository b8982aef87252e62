"""transformers' Trainer with our loss, our evaluation and checkpoints of the trained weights alone
(safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from prunekit.errors import DataError
from prunekit.recovery.data import Row, collate
from prunekit.recovery.distill import forward, plain_loss, predicted, total_loss
from prunekit.recovery.settings import VALIDATION, Recovery
from prunekit.runtime.console import say

WEIGHTS = "trained.safetensors"
BEST = "best.safetensors"
Watch = Mapping[str, Callable[[nn.Module], float]]


def arguments(
    recovery: Recovery,
    folder: Path,
    device: torch.device,
    micro: int,
    steps: int,
    seed: int,
    fresh: bool,
) -> Any:
    """TrainingArguments of a recovery with `micro` rows a forward pass of `steps` accumulated;
    `fresh`: not resumed.
    """
    made = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        num_train_epochs=recovery.epochs,
        learning_rate=recovery.learning_rate,
        lr_scheduler_type=recovery.schedule,
        warmup_steps=recovery.warmup_steps,
        weight_decay=recovery.weight_decay,
        max_grad_norm=recovery.clip,
        optim="adamw_torch",
        bf16=mixed_precision(recovery, device),
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_on_start=fresh and recovery.evaluations > 0,
        save_strategy="no",  # `Course` asks for evaluations and checkpoints itself
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
    )
    made.device  # noqa: B018  (sets the processes up, and counts GPUs)
    made._n_gpu = min(made.n_gpu, 1)  # one process works on one GPU
    return made


def mixed_precision(recovery: Recovery, device: torch.device) -> bool:
    """Whether forward passes compute in bfloat16."""
    if recovery.bf16 == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return recovery.bf16


class RecoveryTrainer(Trainer):
    """A Trainer whose loss is the mean over the tokens of the global batch, however that is
    divided.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: Any,
        rows: Sequence[Row],
        validation: Sequence[Row],
        pad: int,
        recovery: Recovery,
        teacher: nn.Module | None,
        watch: Watch,
        watched: nn.Module,
    ) -> None:
        course = Course(recovery, Path(args.output_dir))
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=lambda chunk: collate(chunk, pad, recovery.pack),
            callbacks=[course],
        )
        course.model = self.trained = model
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = (
            True  # that is: the loss is divided by the global batch's tokens already
        )
        self.validation, self.pad, self.recovery = validation, pad, recovery
        self.teacher = None if teacher is None else teacher.to(args.device).eval()
        self.watch, self.watched = watch, watched

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step and how many tokens they predict, over all processes; those
        are counted.
        """
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.state.num_input_tokens_seen += int(items or 0)
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the mean loss, times the processes that gradients are
        averaged over.
        """
        loss = total_loss(model, self.teacher, inputs, self.recovery)
        return (
            loss * self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure and log every held-out perplexity; every process takes part."""
        self.trained.eval()
        found: dict[str, float] = {}
        logs: dict[str, Any] = {"perplexity": found}
        if self.validation:
            logs["validation_loss"] = self._validation_loss()
            found[VALIDATION] = math.exp(min(logs["validation_loss"], 700.0))
        with torch.no_grad():
            found.update(
                {name: float(measure(self.watched)) for name, measure in self.watch.items()}
            )
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    @torch.no_grad()
    def _validation_loss(self) -> float:
        own = self.validation[self.args.process_index :: self.args.world_size]
        sums = torch.zeros(2, dtype=torch.float64)
        size = self.args.per_device_train_batch_size
        for start in range(0, len(own), size):
            batch = {
                k: v.to(self.args.device)
                for k, v in collate(own[start : start + size], self.pad, False).items()
            }
            chosen = predicted(batch)
            with self.compute_loss_context_manager():
                logits = forward(self.trained, batch).logits[:, :-1][chosen]
            loss = plain_loss(logits, batch["labels"][:, 1:][chosen])
            sums += torch.tensor([loss.item(), chosen.sum().item()], dtype=torch.float64)
        loss, count = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        return loss / max(count, 1)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights, by the first process."""
        if self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_trained(self.trained, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.trained, Path(resume_from_checkpoint) / WEIGHTS)


class Course(TrainerCallback):
    """When to evaluate, keep a checkpoint, stop; what the best state was. All of it follows from
    the logged history.
    """

    def __init__(self, recovery: Recovery, folder: Path) -> None:
        self.recovery, self.folder = recovery, folder
        self.model: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation and a checkpoint where they are due."""
        step, last = state.global_step, state.max_steps
        count = self.recovery.evaluations
        control.should_evaluate = count > 0 and (step * count // last > (step - 1) * count // last)
        control.should_save = (
            bool(self.recovery.checkpoints)
            and step % self.recovery.checkpoints == 0
            and step < last
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the tokens so far; say how it goes; stop where the loss is no number any more."""
        state.log_history[-1]["tokens"] = state.num_input_tokens_seen
        values = [logs[key] for key in ("loss", "validation_loss") if key in logs]
        values += logs.get("perplexity", {}).values()
        if not all(map(math.isfinite, values)):
            raise DataError(
                f"recovery: the loss at step {state.global_step} is {values[0]}: its weights or activations hold NaN "
                f"or infinity; a smaller recovery.learning_rate than {self.recovery.learning_rate:g} may help"
            )
        if state.is_world_process_zero and (line := _line(state, logs)):
            say(line)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the state where it is the best so far; end the training where patience is at its
        end.
        """
        patience = self.recovery.patience
        if patience is None:
            return
        measured = perplexities(state.log_history, self.recovery.stop_on)
        best = measured.index(min(measured))
        if best == len(measured) - 1 and state.is_world_process_zero:
            save_trained(self.model, self.folder / BEST)
        if len(measured) - 1 - best >= patience:
            control.should_training_stop, control.should_save = True, False


def perplexities(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """One perplexity from every evaluation in the history."""
    return [entry["perplexity"][name] for entry in history if "perplexity" in entry]


def save_trained(model: nn.Module, path: Path) -> None:
    """Write the trainable parameters as they are now, all or nothing."""
    trained = {
        name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad
    }
    save_file(trained, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)  # noqa: PTH105


@torch.no_grad()
def load_trained(model: nn.Module, path: Path) -> None:
    """Read them back."""
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        parameters[name].copy_(tensor)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: its state is written last."""
    for path in sorted(
        folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True
    ):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return path
    return None


def _line(state: Any, logs: Mapping[str, Any]) -> str:
    where = f"recovery: step {state.global_step}/{state.max_steps}"
    if "perplexity" in logs:
        return f"{where}, perplexity " + ", ".join(
            f"{name} {value:.4g}" for name, value in logs["perplexity"].items()
        )
    due = "loss" in logs and state.global_step % max(state.max_steps // 20, 1) == 0
    return f"{where}, loss {logs['loss']:.4f}" if due else ""
