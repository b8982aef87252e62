"""The tasks of the command line as functions: evaluate, recover, export, prune_checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import EllipsisType

from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit import config as cfg
from prunekit.allocation.costs.base import CostModel
from prunekit.compensation import Compensation
from prunekit.errors import ConfigError
from prunekit.exports import Export
from prunekit.importance import Importance
from prunekit.jobs.export import ExportSettings, run_export
from prunekit.jobs.job import GivenObjects
from prunekit.jobs.run import run_job
from prunekit.jobs.sources import Source, check_folder, check_source
from prunekit.policies import Policy
from prunekit.recovery import Recovery
from prunekit.report import Report
from prunekit.schedules import Schedule
from prunekit.schedules.method import compose_pruning, describe_objects


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What `recover` leaves.

    Attributes:
        model: the fine-tuned model; the one that was given, where one in memory was.
        report: the figures before and after, and the curve of the training.
    """

    model: PreTrainedModel
    report: Report


def prune_checkpoint(
    folder: str | Path,
    out: str | Path,
    *,
    ratio: float | None = None,
    method: str = "slimgpt",
    importance: str | Importance | None = None,
    policy: str | Policy | None = None,
    compensation: str | Compensation | EllipsisType | None = ...,
    schedule: str | Schedule | None = None,
    cost: str | CostModel | None = None,
    overrides: Sequence[str] = (),
) -> Report:
    """Prune a model's folder into another folder, as `task=prune` does.

    Layers come from disk and go there one by one where memory is short, or with
    "memory.stream=true" among the overrides.

    Example:
        ```python
        prunekit.prune_checkpoint("dense", "pruned", ratio=0.5, overrides=["data=c4"])
        model = prunekit.from_pretrained("pruned/model")
        ```

    Args:
        folder: a model's folder, the folder of a run, or a name on the hub.
        out: the folder of the run, new or empty: the model goes to `out/model`, its plan and the
            report go beside it.
        ratio: as for `prune`.
        method: as for `prune`.
        importance: as for `prune`.
        policy: as for `prune`.
        compensation: as for `prune`.
        schedule: as for `prune`.
        cost: as for `prune`.
        overrides: strings as on the command line: the calibration text, what is measured, a
            recovery, an export, the device, …

    Returns:
        The report, as in `out/report.json`.

    Raises:
        PrunekitError: whatever is wrong with the request; `out` then holds no result.
    """
    check_folder(folder, "folder", "; a model in memory: prunekit.prune")
    check_folder(out, "out")
    choices = {"importance": importance, "policy": policy, "schedule": schedule, "cost": cost}
    config, backends = compose_pruning(
        cfg.PRUNE_CHECKPOINT, method, ratio, choices, compensation, overrides
    )
    config.model.path, config.output_dir = str(folder), str(out)
    inputs = GivenObjects(backends=backends)
    return run_job(config, Path(out), _record(config), inputs=inputs).report


def evaluate(
    model: Source,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    baseline: Source | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Report:
    """Measure a model, as `task=evaluate` does: perplexity, tasks, samples, size, speed.

    Example:
        ```python
        report = prunekit.evaluate("pruned", baseline="dense", overrides=["eval.corpora=[c4]"])
        report["perplexity"]["c4"]["model"]
        ```

    Args:
        model: a causal language model of transformers; or a model's folder, the folder of a run, a
            name on the hub.
        tokenizer: the tokenizer of the model; needed for one in memory.
        baseline: the dense model, to be measured beside.
        out: a new or empty folder for the report; None: nothing is written.
        overrides: strings as on the command line: `eval=…`, `eval.corpora=[…]`, …

    Returns:
        The report.

    Raises:
        ConfigError: an override that evaluating does not act on, an unknown task, …
        DataError: a corpus that can't be read.
        CheckpointError: a folder that holds no model.
    """
    call = _call_on(cfg.EVALUATE, model, out)
    config = _configure(call, model, overrides, {"task": "evaluate"}, baseline)
    inputs = _make_inputs(model, tokenizer, baseline)
    folder = None if out is None else Path(out)
    return run_job(config, folder, _record(config), inputs=inputs).report


def recover(
    model: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    recovery: str | Recovery = "lora",
    dense: Source | None = None,
    out: str | Path | None = None,
    updates: Mapping[str, tuple[Tensor, ...]] | None = None,
    overrides: Sequence[str] = (),
) -> Recovered:
    """Fine-tune a pruned model, as `task=recover` does; one in memory is changed in place.

    Example:
        ```python
        recovered = prunekit.recover(model, tokenizer, overrides=["recovery.epochs=2"])
        prunekit.save_pretrained(recovered.model, "recovered", tokenizer)
        ```

    Args:
        model: a causal language model of transformers; or a model's folder, the folder of a run, a
            name on the hub.
        tokenizer: the tokenizer of the model; needed for one in memory.
        recovery: a name of `conf/recovery`, or the settings as an object.
        dense: the dense model: measured beside, and the teacher where the recovery needs one.
        out: a new or empty folder, which gets the model and the report; None: nothing is written.
        updates: name of a weight → U [out, r] and V [r, in], whose product it holds and adapters go
            on from: `updates` of the result of `prunekit.prune`; a run's folder brings its own.
        overrides: strings as on the command line: `recovery.corpus=…`, `eval=…`, …

    Returns:
        The model and the report.

    Raises:
        ConfigError: an override that recovering does not act on, a setting that doesn't fit.
        DataError: data that can't be read.
        CheckpointError: a folder that holds no model.
    """
    call = _call_on(cfg.RECOVER, model, out)
    arguments = {"task": "recover"}
    if isinstance(recovery, str):
        arguments["recovery"] = recovery
    elif isinstance(recovery, Recovery):
        call = call.with_object("recovery")
    else:
        raise ConfigError(
            "recovery: expected a name, or an object of prunekit.recovery.Recovery, "
            f"got {recovery!r}"
        )
    if out is None:
        call = call.without_folder()
    config = _configure(call, model, overrides, arguments, dense)
    own = None if isinstance(recovery, str) else recovery
    describe_objects(config, {"recovery": own} if own else {})
    if out is None and not (own.merge if own else config.recovery.get("merge", True)):
        raise ConfigError("recovery.merge=false: expected out=FOLDER for the adapter, got none")
    inputs = replace(_make_inputs(model, tokenizer, dense, own), updates=updates)
    folder = None if out is None else Path(out)
    completed = run_job(config, folder, _record(config), inputs=inputs)
    assert completed.model is not None
    return Recovered(model=completed.model, report=completed.report)


def export(
    model: Source,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    format: str | Export | None = None,
    overrides: Sequence[str] = (),
) -> list[Path]:
    """Write a model for other programs, as `task=export` does.

    Example:
        ```python
        prunekit.export("pruned", "exported", format="gguf", overrides=["export.dtype=q8_0"])
        ```

    Args:
        model: a causal language model of transformers; or a model's folder, the folder of a run, a
            name on the hub.
        out: a new or empty folder.
        tokenizer: the tokenizer of the model; needed for one in memory.
        format: a name of `conf/export`, or an object that writes the format; None: none.
        overrides: strings as on the command line: `export.remote_code=true`,
            `export.push_to_hub=user/name`, …

    Returns:
        The files and folders that were written.

    Raises:
        ConfigError: nothing to write was asked for; an override that exporting does not act on.
        ExportError: what the format can't express, or a package that is missing.
        CheckpointError: a folder that holds no model.
    """
    check_folder(out, "out")
    call = _call_on(cfg.EXPORT, model)
    arguments = {"task": "export"}
    if isinstance(format, str):
        arguments["export"] = format
    elif format is not None:
        call = call.with_object("export", frozenset(f"export.{key}" for key in cfg.BUILT["export"]))
    config = _configure(call, model, overrides, arguments)
    writer = None if isinstance(format, str) else format
    settings = ExportSettings.build(config.export, writer)
    inputs = _make_inputs(model, tokenizer)
    source = None if inputs.model is None else inputs.model
    return run_export(config, Path(out), settings=settings, source=source, tokenizer=tokenizer)


def _call_on(call: cfg.ApiCall, model: Source, out: str | Path | None = None) -> cfg.ApiCall:
    """The function on this model; ConfigError where the model or the folder can't be one."""
    check_source(model, "model")
    if out is not None:
        check_folder(out, "out")
    return call.on_loaded_model() if isinstance(model, PreTrainedModel) else call


def _configure(
    call: cfg.ApiCall,
    model: Source,
    overrides: Sequence[str],
    arguments: Mapping[str, str],
    baseline: Source | None = None,
) -> cfg.RunConfig:
    """Compose and check the configuration of a call; places go in as they are, without quoting."""
    if baseline is not None:
        check_source(baseline, "the dense model")
        given = "given twice: the dense model is an argument of the function already"
        call = call.without(frozenset({"eval.baseline"}), given)
    config = cfg.check(call.compose(overrides, arguments))
    if isinstance(model, str | Path):
        config.model.path = str(model)
    if isinstance(baseline, str | Path):
        config.eval.baseline = str(baseline)
    return config


def _make_inputs(
    model: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    baseline: Source | None = None,
    recovery: Recovery | None = None,
) -> GivenObjects:
    """The objects among the arguments.

    Raises:
        ConfigError: a model in memory without its tokenizer; a tokenizer that is none.
    """
    loaded = model if isinstance(model, PreTrainedModel) else None
    if loaded is not None and tokenizer is None:
        raise ConfigError("tokenizer: expected the tokenizer of the model in memory, got none")
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise ConfigError(
            "tokenizer: expected a tokenizer of transformers, as AutoTokenizer.from_pretrained "
            f"loads it, got {tokenizer!r}"
        )
    return GivenObjects(
        model=loaded,
        tokenizer=tokenizer,
        baseline=baseline if isinstance(baseline, PreTrainedModel) else None,
        recovery=recovery,
    )


def _record(config: cfg.RunConfig) -> dict[str, str]:
    """What `.hydra/` keeps of a run: its configuration."""
    return {"config.yaml": OmegaConf.to_yaml(OmegaConf.create(asdict(config)))}
