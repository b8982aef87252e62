"""What every job of the command line is given and leaves, and how models are found and loaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from prunekit.checkpoint import from_pretrained, load_tokenizer, save_pretrained
from prunekit.checkpoint.files import read_config
from prunekit.checkpoint.streamed import Streamed
from prunekit.config import RunConfig
from prunekit.demo import DEMO_MODEL
from prunekit.evaluation.evaluation import Evaluation
from prunekit.evaluation.measures import Measures
from prunekit.model.build import needs_prunekit
from prunekit.model.weights import cast_weights
from prunekit.plan import PruningPlan
from prunekit.recovery import detach
from prunekit.report import model_card
from prunekit.runtime.devices import compute_dtype, pick_dtype
from prunekit.runtime.files import checksum, digest, write_text
from prunekit.runtime.memory import free_bytes
from prunekit.runtime.stages import Stages

_SHARE = 0.6  # of the free memory that a second model may take


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do, the folder its result goes to, the device and its clock."""

    config: RunConfig
    output: Path
    stages: Stages

    def load(
        self, source: str | Path, stored: torch.dtype | None = None
    ) -> tuple[Any, torch.dtype]:
        """The model, ready to compute, and the type it will be stored in (`load`)."""
        trust = self.config.model.trust_remote_code
        return load(source, self.stages.device, stored or pick_dtype(self.config.dtype), trust)

    def tokenizer(self, source: str | Path) -> Any:
        """The model's."""
        return load_tokenizer(source, self.config.model.trust_remote_code)

    def measures(self, tokenizer: Any, model: Any, stored: torch.dtype) -> Measures:
        """What the configuration measures on this model and on others with its tokenizer."""
        return Measures(
            self.config.eval,
            corpora=self.config.corpora,
            seed=self.config.seed,
            tokenizer=tokenizer,
            device=self.stages.device,
            model=model,
            stored=stored,
        )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a job leaves beside its report: a model (written already where it was streamed), its
    plan, an adapter.
    """

    model: Any
    tokenizer: Any
    plan: PruningPlan | None
    streamed: Streamed | None = None
    adapter: Path | None = None

    def write(self, output: Path, report: Mapping[str, Any], remote_code: bool) -> None:
        """The model's folder with its card, the plan, the adapter."""
        if self.adapter is not None:
            detach(self.model)
        folder = output / "model"
        if self.streamed is not None and self.streamed.writer is not None:
            self.streamed.writer.finish(self.model, self.tokenizer, remote_code=remote_code)
        else:
            save_pretrained(self.model, folder, self.tokenizer, remote_code=remote_code)
        write_text(folder / "README.md", model_card(report, loading_of(folder)))
        if self.plan is not None:
            write_text(output / "plan.json", self.plan.to_json())
        if self.adapter is not None:
            shutil.copytree(self.adapter, output / "adapter")


def loading_of(folder: Path) -> Literal["stock", "remote", "prunekit"]:
    """What loads a folder that was saved: transformers alone, it with the code beside the weights,
    or prunekit.
    """
    config = read_config(folder)
    return "remote" if config.get("auto_map") else "prunekit" if needs_prunekit(config) else "stock"


def load(
    source: str | Path, device: torch.device, stored: torch.dtype | None, trust_remote_code: bool
) -> tuple[Any, torch.dtype]:
    """The model in the type it computes in, and the type its result is stored in.

    Half-precision checkpoints compute in float32 on a CPU; the result is stored as the checkpoint
    was, or as asked.
    """
    model = from_pretrained(source, trust_remote_code=trust_remote_code)
    stored = stored or next(model.parameters()).dtype
    cast_weights(model, compute_dtype(stored, device))
    return model.to(device), stored


def source_of(config: RunConfig) -> str | Path:
    """Where the model is: the embedded one, a folder (of a model, or of a run, whose model it is),
    or a hub name.
    """
    source = config.model.path or DEMO_MODEL
    return Path(source) / "model" if (Path(source) / "model" / "config.json").is_file() else source


def base_of(config: RunConfig) -> str | None:
    """The dense model's name on the hub, where it came from there."""
    return config.model.path if config.model.path and not Path(config.model.path).exists() else None


def identity_of(source: str | Path) -> str:
    """A folder's weight files with their sizes and times, or a hub name."""
    files = sorted(Path(source).glob("*.safetensors"))
    return f"{source} " + ", ".join(
        f"{f.name} {f.stat().st_size} {int(f.stat().st_mtime)}" for f in files
    )


def content_of(source: str | Path) -> str:
    """The content of a model's folder, byte for byte."""
    files = sorted(
        [
            *Path(source).glob("*.safetensors"),
            *Path(source).glob("*.json"),
            *Path(source).glob("*.py"),
        ]
    )
    return digest(part for file in files for part in (file.name, checksum(file)))


def speeds(
    job: Job,
    measures: Measures,
    columns: Mapping[str, Evaluation],
    sources: Mapping[str, str | Path],
    models: Mapping[str, Any],
) -> dict[str, Any]:
    """Tokens/s of the models, and of those that `sources` still have if there is room for them
    beside.
    """
    if not (job.config.eval.speed and measures.windows):
        return {}
    width = max(p.dtype.itemsize for model in models.values() for p in model.parameters())
    beside = {}
    for name, source in sources.items():
        if columns[name].parameters * width <= _SHARE * free_bytes(job.stages.device):
            beside[name] = job.load(source)[0]
    with job.stages("speed"):
        return measures.speed({**beside, **models}).to_json()
