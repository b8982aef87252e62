"""transformers' Trainer with our loss and evaluation, and checkpoints of the trained weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from prunekit.recovery.callbacks import Monitor, Patience
from prunekit.recovery.data import Row, collate
from prunekit.recovery.distill import forward, mark_predicted, plain_loss, total_loss
from prunekit.recovery.settings import VALIDATION, Recovery
from prunekit.recovery.states import load_trained, save_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "trained.safetensors"  # in a checkpoint's folder
BEST = "best.safetensors"  # beside the checkpoints
_STOP_ON = "eval_stop_on"  # the one perplexity that early stopping is told of
Watch = Mapping[str, Callable[[Any], float]]


def make_arguments(
    recovery: Recovery,
    folder: Path,
    device: torch.device,
    *,
    micro_batch: int,
    accumulation: int,
    seed: int,
    fresh: bool,
) -> TrainingArguments:
    """Transformers' arguments of a recovery.

    Args:
        recovery: the settings.
        folder: where checkpoints are written.
        device: where the model is.
        micro_batch: rows of a forward pass.
        accumulation: forward passes of one step, in each process.
        seed: of the order and of dropout.
        fresh: whether the training begins, rather than goes on from a checkpoint.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=recovery.epochs,
        learning_rate=recovery.learning_rate,
        lr_scheduler_type=recovery.schedule,
        warmup_steps=recovery.warmup_steps,
        weight_decay=recovery.weight_decay,
        max_grad_norm=recovery.clip,
        optim="adamw_torch",
        bf16=uses_bfloat16(recovery, device),
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_on_start=fresh and recovery.evaluations > 0,
        save_strategy="no",  # `Monitor` asks for evaluations and checkpoints
        save_total_limit=1,
        metric_for_best_model=None if recovery.patience is None else _STOP_ON,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # how long patience has lasted
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
    )
    _use_one_gpu(arguments)
    return arguments


def _use_one_gpu(arguments: TrainingArguments) -> None:
    """Let this process work on one GPU; transformers would copy the model to all GPUs."""
    _ = arguments.device  # reading `device` sets the processes up, and counts GPUs
    arguments._n_gpu = min(arguments.n_gpu, 1)


def uses_bfloat16(recovery: Recovery, device: torch.device) -> bool:
    """Whether forward passes compute in bfloat16."""
    if isinstance(recovery.bf16, bool):
        return recovery.bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


class RecoveryTrainer(Trainer):
    """A Trainer whose loss is the mean over the tokens of the global batch, however it is divided.

    Args:
        model: what is trained: the pruned model, or peft's wrapper of it.
        args: transformers' arguments.
        rows: what is trained on.
        validation: rows held out.
        pad: the token that fills rows.
        recovery: the settings.
        teacher: the dense model, where the loss compares with it.
        watch: corpus → its perplexity on the pruned model.
        watched: the pruned model.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        rows: Sequence[Row],
        validation: Sequence[Row],
        pad: int,
        recovery: Recovery,
        teacher: PreTrainedModel | None,
        watch: Watch,
        watched: PreTrainedModel,
    ) -> None:
        callbacks: list[Any] = [Monitor(recovery)]
        if recovery.patience is not None:
            callbacks.append(Patience(early_stopping_patience=recovery.patience))
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=lambda chunk: collate(chunk, pad, recovery.pack),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # This says that the loss is divided by the tokens of the global batch already.
        self.model_accepts_loss_kwargs = True
        self.trained, self.watched = model, watched
        self.validation, self.pad, self.recovery, self.watch = validation, pad, recovery, watch
        self.teacher: Any = None if teacher is None else teacher.to(args.device).eval()  # type: ignore[arg-type]

    @property
    def best_path(self) -> Path:
        """The file of the best state so far, where patience is set."""
        return Path(str(self.args.output_dir)) / BEST

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step, and how many tokens they predict over all processes.

        The tokens are added to the state's count.
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
        """This micro-batch's share of the mean loss.

        It is multiplied by the number of processes, over which gradients are averaged.
        """
        loss = total_loss(model, self.teacher, inputs, self.recovery)
        count = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return loss * self.accelerator.num_processes / count

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure and log every held-out perplexity; keep the state where it is the best so far.

        Every process takes part. Returned is what early stopping goes by.
        """
        self.trained.eval()
        perplexity: dict[str, float] = {}
        logs: dict[str, Any] = {"perplexity": perplexity}
        if self.validation:
            logs["validation_loss"] = self._validation_loss()
            perplexity[VALIDATION] = math.exp(min(logs["validation_loss"], 700.0))
        with torch.no_grad():
            for name, measure in self.watch.items():
                perplexity[name] = float(measure(self.watched))
        self.log(logs)
        metrics: dict[str, float] = {}
        if self.recovery.patience is not None:
            metrics[_STOP_ON] = perplexity[self.recovery.stop_on]
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.control.should_training_stop:
            self.control.should_save = False  # nothing will go on from here
        if metrics:
            self._keep_best(metrics[_STOP_ON])
        return metrics

    def _keep_best(self, value: float) -> None:
        """Note a new best state; transformers would leave out the one before the first step."""
        if self.state.best_metric is None or value < self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            if self.args.should_save:
                save_trained(self.trained, self.best_path)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """The mean loss over the tokens held out, each process on its part of the rows."""
        rows = self.validation[self.args.process_index :: self.args.world_size]
        size = self.args.per_device_train_batch_size
        sums = [self._sum_losses(rows[start : start + size]) for start in range(0, len(rows), size)]
        # Fetched once: in the loop that would wait for the GPU in every pass.
        fetched = torch.stack(sums).tolist() if sums else []
        both = [sum(column) for column in zip(*fetched, strict=True)] or [0.0, 0.0]
        totals = torch.tensor(both, dtype=torch.float64, device=self.args.device)
        loss, count = self.accelerator.reduce(totals, "sum").tolist()
        return loss / max(count, 1)

    def _sum_losses(self, rows: Sequence[Row]) -> Tensor:
        """The sum of the losses of some rows, and the number of their tokens: float32 [2]."""
        batch = {
            key: value.to(self.args.device)
            for key, value in collate(rows, self.pad, packed=False).items()
        }
        chosen = mark_predicted(batch)
        with self.compute_loss_context_manager():
            logits = forward(self.trained, batch).logits[:, :-1][chosen]
        loss = plain_loss(logits, batch["labels"][:, 1:][chosen])
        return torch.stack([loss, chosen.sum().to(loss.dtype)])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights, by the first process."""
        if self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_trained(self.trained, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.trained, Path(resume_from_checkpoint) / WEIGHTS)
