"""What `gpu.py` measures, a function for each part; all run on a CPU too, in small."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import prunekit
from prunekit import config as cfg
from prunekit import pipeline
from prunekit.calibration.moments import Moments
from prunekit.checkpoint import load_tokenizer
from prunekit.checkpoint.streamed import Streamed
from prunekit.data.batches import make_batches
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import calibration_windows
from prunekit.demo import DEMO_MODEL
from prunekit.evaluation.perplexity import perplexity
from prunekit.runtime.memory import free_cached, peak_memory, reset_peak
from prunekit.runtime.stages import Stages
from prunekit.schedules import Layerwise, OneShot, repair
from prunekit.schedules.folders import Folders
from prunekit.schedules.method import Method
from prunekit.surgery import check

if TYPE_CHECKING:
    from gpu import Bench

CPU = torch.device("cpu")
MB = 1e6
WIDTHS = {"default": [], "free": ["shapes=free"], "multiples_of_64": ["scope.width_multiple=64"]}
TOLERANCE = 0.5  # per cent that the perplexities of two devices may differ by


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the parts are.

    `name`: of the model's shape, in words. `samples`, `length`: of the calibration tokens, of which
    a forward pass takes `batch` rows. `few_layers`: of the model that is streamed and the one that
    decodes. `streamed_samples`, `budget`: of the streamed run, and its bytes of activations on the
    device. `repeats`: of a timed call, of models cut by `ratios`. `embedded`: samples and length
    for the embedded model, of which the first `embedded_layers` are taken, and whose perplexity is
    measured on so many `windows`. `rounding`: layers and hidden size of the model that amplifies
    it. `steps`: of the recovery.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    samples: int
    length: int
    batch: int
    few_layers: int
    streamed_samples: int
    budget: int
    repeats: int
    ratios: tuple[float, ...]
    embedded: tuple[int, int]
    embedded_layers: int
    windows: int
    rounding: tuple[int, int]
    steps: int


FULL = Sizes(
    name="LLaMA-7B's shape",
    hidden=4096,
    intermediate=11008,
    layers=32,
    heads=32,
    vocabulary=32000,
    samples=128,
    length=2048,
    batch=4,
    few_layers=8,
    streamed_samples=256,
    budget=45 * 10**8,
    repeats=20,
    ratios=(0.2, 0.5),
    embedded=(128, 128),
    embedded_layers=8,
    windows=64,
    rounding=(30, 512),
    steps=50,
)
SMALL = Sizes(
    name="a tiny Llama",
    hidden=64,
    intermediate=172,
    layers=3,
    heads=4,
    vocabulary=97,
    samples=16,
    length=32,
    batch=4,
    few_layers=2,
    streamed_samples=16,
    budget=50_000,
    repeats=2,
    ratios=(0.2,),
    embedded=(16, 32),
    embedded_layers=2,
    windows=4,
    rounding=(6, 48),
    steps=2,
)


class Stopwatch:
    """Adds up what parts of a run take on a device, by name, without making it wait for the host.

    On a GPU the seconds are those between two events of its stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._marks[name].append((begin, self._mark()))

    def seconds(self) -> dict[str, list[float]]:
        """Name → the seconds of each turn."""
        if self.device.type != "cuda":
            return {name: [b - a for a, b in pairs] for name, pairs in self._marks.items()}
        torch.cuda.synchronize(self.device)
        return {
            name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in self._marks.items()
        }

    @contextmanager
    def watching(self, functions: dict[str, tuple[Any, str]]) -> Iterator[None]:
        """Time functions inside a `with` block: name → (owner, attribute)."""
        with ExitStack() as stack:
            for name, (owner, attribute) in functions.items():
                timed = self._timed(getattr(owner, attribute), name)
                stack.enter_context(patch.object(owner, attribute, timed))
            yield

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.time(name):
                return function(*args, **kwargs)

        return timed


STAGES = {
    "whole": (pipeline, "prune_model"),
    "trace": (pipeline, "trace_batch"),
    "schedule": (Layerwise, "run"),
    "products": (Moments, "add"),
    "cut": (repair, "cut_group"),
    "surgery": (pipeline, "apply_plan"),
    "masked": (check, "expect"),
    "compared": (check.Expectation, "check"),
}
# Scores of units from the dense model, and what is to be added to `method=llm_pruner` for them.
SCORES = {
    "taylor_first": [],
    "taylor_second": [],
    "lora_gradient": [],
    "ablation": ["groups=layer", "policy=uniform"],
}


def make_config(bench: Bench, layers: int | None = None) -> Any:
    sizes = bench.sizes
    return AutoConfig.for_model(
        "llama",
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers or sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=max(sizes.length, 256),
        bos_token_id=0,
        eos_token_id=1,
    )


def make_model(bench: Bench, layers: int | None = None) -> Any:
    """A model of random weights, made on the device; half precision where that is a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    with bench.device:
        return AutoModelForCausalLM.from_config(make_config(bench, layers), dtype=dtype).eval()


def draw_tokens(bench: Bench, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, bench.sizes.vocabulary, (rows, length), generator=generator)


def describe(bench: Bench, rows: int, length: int, what: str, layers: int | None = None) -> str:
    sizes = bench.sizes
    some = f", {layers} layers" if layers else ""
    dtype = "bfloat16" if bench.device.type == "cuda" else "float32"
    return f"{sizes.name}{some}, random {dtype} weights, {rows} × {length} tokens, {what}"


def prune_by_stage(bench: Bench, name: str, target: str, samples: int | None = None) -> None:
    """Prune the whole shape by 20 %; seconds of every stage, and the peak."""
    sizes, watch, peaks = bench.sizes, Stopwatch(bench.device), {}
    samples = samples or sizes.samples
    ids = draw_tokens(bench, samples, sizes.length)
    options = [f"data.calibration.batch_size={sizes.batch}", f"compensation.target={target}"]
    if bench.device.type == "cuda":  # kernels are loaded before anything is timed
        few = make_model(bench, 1)
        prunekit.prune(few, ratio=0.2, calibration=ids[: 2 * sizes.batch], overrides=options)
        del few
        free_cached()
        reset_peak(bench.device)
    model, run = make_model(bench), Layerwise.run

    def noted(schedule: Layerwise, task: Any) -> Any:
        plan = run(schedule, task)
        peaks["schedule"] = peak_memory(bench.device) / MB
        return plan

    with patch.object(Layerwise, "run", noted), watch.watching(STAGES):
        report = prunekit.prune(model, ratio=0.2, calibration=ids, overrides=options).report
        seconds = {stage: sum(turns) for stage, turns in watch.seconds().items()}
    what = f"ratio=0.2, target={target}"
    measured = describe(bench, samples, sizes.length, what)
    parts = sum(seconds[stage] for stage in ("products", "cut"))
    seconds["forward"] = seconds["schedule"] - parts
    seconds["rest"] = seconds["whole"] - seconds["schedule"] - seconds["trace"]
    seconds["check"] = seconds.pop("masked") + seconds.pop("compared")
    for stage, value in seconds.items():
        bench.figure(f"{name}.{stage}", value, "s", measured)
    peaks["whole"] = highest_peak(report)
    for stage, value in peaks.items():
        bench.figure(f"{name}.{stage}_peak", value, "MB", measured)
    bench.figure(f"{name}.ratio", report["ratio"]["achieved"], "of the parameters", measured)


def pruned(bench: Bench) -> None:
    prune_by_stage(bench, "pruned", "pruned")


def more_samples(bench: Bench) -> None:
    prune_by_stage(bench, "more_samples", "pruned", bench.sizes.streamed_samples)


def residual(bench: Bench) -> None:
    prune_by_stage(bench, "residual", "residual")
    if "pruned.schedule" in bench.values:
        ratio = bench.values["residual.schedule"] / bench.values["pruned.schedule"]
        measured = "the schedule with target=residual over that with target=pruned"
        bench.figure("residual.to_pruned", ratio, "times", measured, aim=1.6)


def prune_at_once(bench: Bench, name: str, method: str, rows: int, length: int) -> None:
    """Prune the whole shape by 20 % with a one-shot method; seconds and the peak."""
    model, watch = make_model(bench), Stopwatch(bench.device)
    ids = draw_tokens(bench, rows, length)
    options = [f"data.calibration.batch_size={rows}"]
    with watch.time("whole"):
        report = prunekit.prune(
            model, ratio=0.2, method=method, calibration=ids, overrides=options
        ).report
    measured = describe(bench, rows, length, f"ratio=0.2, method={method}")
    bench.figure(f"{name}.whole", sum(watch.seconds()["whole"]), "s", measured)
    bench.figure(f"{name}.whole_peak", highest_peak(report), "MB", measured)


def highest_peak(report: Any) -> float:
    """The highest of the peaks of a run's stages, in MB."""
    return max(report["peak_memory_bytes"].values()) / MB


def llm_pruner(bench: Bench) -> None:
    prune_at_once(bench, "llm_pruner", "llm_pruner", 10, min(128, bench.sizes.length))


def magnitude(bench: Bench) -> None:
    prune_at_once(bench, "magnitude", "magnitude", 2, min(64, bench.sizes.length))


def scoring(bench: Bench) -> None:
    """Score the units of the whole shape in several ways; seconds of choosing, and the peak."""
    rows, length = 10, min(128, bench.sizes.length)
    ids = draw_tokens(bench, rows, length)
    warm = ["importance=taylor_second", "policy=uniform", f"data.calibration.batch_size={rows}"]
    few = make_model(bench, 1)  # kernels are loaded before anything is timed
    prunekit.prune(few, ratio=0.2, method="llm_pruner", calibration=ids, overrides=warm)
    del few
    for importance, more in SCORES.items():
        free_cached()
        model, watch = make_model(bench), Stopwatch(bench.device)
        options = [f"importance={importance}", f"data.calibration.batch_size={rows}", *more]
        with watch.watching({"schedule": (OneShot, "run")}):
            report = prunekit.prune(
                model, ratio=0.2, method="llm_pruner", calibration=ids, overrides=options
            ).report
        measured = describe(bench, rows, length, f"ratio=0.2, importance={importance}")
        took = sum(watch.seconds()["schedule"])
        bench.figure(f"scoring.{importance}", took, "s", measured)
        bench.figure(f"scoring.{importance}_peak", highest_peak(report), "MB", measured, aim=24e3)
    ratio = bench.values["scoring.taylor_second"] / bench.values["scoring.taylor_first"]
    bench.figure("scoring.second_to_first", ratio, "times", "choosing with each", aim=2.5)


def cut_at_random(
    bench: Bench, ratio: float, options: Sequence[str], layers: int | None = None
) -> Any:
    """A model of random weights with the widths that SlimGPT's policy gives; no units scored."""
    model, ids = make_model(bench, layers), draw_tokens(bench, 2, 16)
    chosen = ["policy=log_increase", *options]
    prunekit.prune(model, ratio=ratio, method="random", calibration=ids, overrides=chosen)
    free_cached()
    return model


@torch.inference_mode()
def time_calls(bench: Bench, call: Callable[[], Any]) -> float:
    """The median milliseconds of a call, after some that are not counted."""
    watch = Stopwatch(bench.device)
    for _ in range(3):
        call()
    for _ in range(bench.sizes.repeats):
        with watch.time("call"):
            call()
    return 1e3 * statistics.median(watch.seconds()["call"])


def prefill(bench: Bench) -> None:
    """Milliseconds of a prefill of one sequence, dense and pruned in several widths."""
    sizes = bench.sizes
    ids = draw_tokens(bench, 1, sizes.length).to(bench.device)

    def measure(name: str, model: Any, what: str, dense: float | None = None) -> float:
        milliseconds = time_calls(bench, lambda: model(input_ids=ids, use_cache=False))
        measured = describe(bench, 1, sizes.length, f"prefill in transformers, {what}")
        more = {} if dense is None else {"of_dense": round(milliseconds / dense, 3)}
        bench.figure(f"prefill.{name}", milliseconds, "ms", measured, sizes.repeats, **more)
        return milliseconds

    dense = measure("dense", make_model(bench), "dense")
    for ratio in sizes.ratios:
        for name, options in WIDTHS.items():
            free_cached()
            model = cut_at_random(bench, ratio, options)
            what = f"ratio={ratio}, {' '.join(options) or 'default widths'}"
            measure(f"{ratio:.0%}.{name}", model, what, dense)
            del model


def decode(bench: Bench) -> None:
    """Milliseconds a token, with a static cache and a compiled forward pass."""
    sizes, dense = bench.sizes, None
    for ratio in (None, *sizes.ratios):
        if ratio is None:
            model = make_model(bench, sizes.few_layers)
        else:
            model = cut_at_random(bench, ratio, [], sizes.few_layers)
        milliseconds = time_calls(bench, _decoder(bench, model))
        dense = dense or milliseconds
        what = "dense" if ratio is None else f"ratio={ratio}, default widths"
        kind = "inductor with CUDA graphs" if bench.device.type == "cuda" else "no inductor"
        measured = describe(
            bench, 1, 1, f"decoding, static cache, torch.compile ({kind}), {what}", sizes.few_layers
        )
        name = "dense" if ratio is None else f"{ratio:.0%}.default"
        more = {} if ratio is None else {"of_dense": round(milliseconds / dense, 3)}
        bench.figure(f"decode.{name}", milliseconds, "ms", measured, sizes.repeats, **more)
        del model
        torch.compiler.reset()
        free_cached()


@torch.inference_mode()
def _decoder(bench: Bench, model: Any) -> Callable[[], None]:
    """A function that decodes one token, after a prefill."""
    ids = draw_tokens(bench, 1, 8).to(bench.device)
    cache = StaticCache(config=model.config, max_cache_len=64 + bench.sizes.repeats)
    token = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    if bench.device.type == "cuda":
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    else:
        forward = torch.compile(model.forward, backend="eager")

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        logits = forward(input_ids=token, past_key_values=cache).logits
        token.copy_(logits[:, -1:].argmax(-1))

    return step


def write_model(bench: Bench, folder: Path) -> float:
    """Write a model of random weights into a folder; the megabytes of its weights."""
    model = make_model(bench, bench.sizes.few_layers)
    prunekit.save_pretrained(model, folder, load_tokenizer(DEMO_MODEL))
    return sum(parameter.nbytes for parameter in model.parameters()) / MB


def streamed(bench: Bench) -> None:
    """The streamed run against the run of the whole model: seconds, their ratio, and peaks."""
    sizes, device = bench.sizes, bench.device
    ids = draw_tokens(bench, sizes.streamed_samples, sizes.length)
    options = ["output_dir=none", "compensation.target=pruned"]
    plans: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        dense = Path(place, "dense")
        weights = write_model(bench, dense)
        free_cached()
        for name, option in (("whole", "null"), ("by_layer", sizes.budget)):
            config = cfg.check(cfg.compose([*options, f"memory.budget={option}"]))
            by_layer = Streamed(dense, device, None, False) if name == "by_layer" else None
            model = by_layer.model if by_layer else prunekit.from_pretrained(dense).to(device)
            stages, folders = Stages(device), Folders(model=Path(place, "out"), undo=False)
            batches, method = make_batches(model, ids, sizes.batch, device), Method.build(config)
            result = pipeline.prune_model(
                model, config, method, batches, stages, folders=folders, streamed=by_layer
            )
            plans[name], seconds[name] = result.plan, stages.seconds["prune"]
            peaks[name] = highest_peak(result.report)
            del by_layer, model, result
            free_cached()
    _report_streamed(bench, weights, seconds, peaks)
    if plans["by_layer"] != plans["whole"]:
        raise ValueError("the streamed run chose other units than the run of the whole model")


def _report_streamed(
    bench: Bench, weights: float, seconds: dict[str, float], peaks: dict[str, float]
) -> None:
    sizes = bench.sizes
    for name, took in seconds.items():
        budget = f", memory.budget={sizes.budget:,}" if name == "by_layer" else ""
        what = f"{weights:,.0f} MB of weights, ratio=0.2, target=pruned, {name}{budget}"
        measured = describe(bench, sizes.streamed_samples, sizes.length, what, sizes.few_layers)
        bench.figure(f"streamed.{name}", took, "s", measured)
        bench.figure(f"streamed.{name}_peak", peaks[name], "MB", measured)
    ratio = seconds["by_layer"] / seconds["whole"]
    measured = "the choice, the repair and the cut of the streamed run over the whole model's"
    bench.figure("streamed.ratio", ratio, "times", measured, aim=1.3)


def rounding(bench: Bench) -> None:
    """Layers whose residual gain amplifies rounding are cut by half in bfloat16: the check passes.

    Raises:
        SurgeryError: the check took rounding for a fault.
    """
    layers, hidden = bench.sizes.rounding
    model = amplifying_model(layers, hidden).to(bench.device)
    ids = torch.randint(2, 97, (16, 32), generator=torch.Generator().manual_seed(0))
    amplified = measure_amplification(model, ids.to(bench.device))
    what = f"{layers} layers, hidden {hidden}, bfloat16, residual gain above one"
    bench.figure("rounding.amplified", amplified, "of the logits' size", what)
    watch = Stopwatch(bench.device)
    with watch.time("whole"):
        prunekit.prune(model, ratio=0.5, calibration=ids)
    bench.figure("rounding.whole", sum(watch.seconds()["whole"]), "s", f"{what}, ratio=0.5")


def amplifying_model(layers: int, hidden: int) -> Any:
    """A model in which every layer adds more to its input than it is given: errors grow."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=97,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (*layer.self_attn.children(), *layer.mlp.children()):
                if isinstance(part, torch.nn.Linear):
                    part.weight.normal_(0, 2.5 * part.in_features**-0.5)
    return model.to(torch.bfloat16)


@torch.no_grad()
def measure_amplification(model: Any, ids: Tensor) -> float:
    """How far rounding takes the logits: those in bfloat16 against those in float32."""
    half = model(input_ids=ids, use_cache=False).logits.float()
    model.float()
    whole = model(input_ids=ids, use_cache=False).logits
    model.to(torch.bfloat16)
    return float((half - whole).norm() / whole.norm())


def embedded(bench: Bench) -> None:
    """The embedded model pruned on the device and on the CPU: one plan, and one perplexity.

    Raises:
        ValueError: the plans differ, or the perplexities do by more than they may.
    """
    windows, held_out = embedded_windows(bench)
    results = {}
    for name, device in (("device", bench.device), ("cpu", CPU)):
        model, watch = load_embedded(bench).to(device), Stopwatch(device)
        with watch.time("whole"):
            result = prunekit.prune(model, ratio=0.2, calibration=windows)
        value = perplexity(model, held_out)
        measured = f"{_embedded(bench)}, {_size(windows)} tokens, ratio=0.2"
        took = sum(watch.seconds()["whole"])
        bench.figure(f"embedded.{name}.whole", took, "s", measured, device=device)
        measured = f"{measured}; {_size(held_out)} tokens held out"
        bench.figure(f"embedded.{name}.perplexity", value, "perplexity", measured, device=device)
        results[name] = (result.plan, value)
    (plan, one), (other, two) = results.values()
    difference = 100 * abs(one / two - 1)
    measured = "perplexity of the model pruned on the device against the one pruned on the CPU"
    bench.figure("embedded.difference", difference, "%", measured, aim=TOLERANCE)
    if plan != other:
        raise ValueError("the plans made on the device and on the CPU differ")
    if not difference <= TOLERANCE:
        raise ValueError(f"perplexities differ by {difference:.2g} %, expected {TOLERANCE} %")


def load_embedded(bench: Bench) -> Any:
    """The embedded model, or its first layers."""
    model = prunekit.from_pretrained(DEMO_MODEL)
    model.config.num_hidden_layers = bench.sizes.embedded_layers
    model.model.layers = model.model.layers[: bench.sizes.embedded_layers]
    return model


def _embedded(bench: Bench) -> str:
    return f"{bench.sizes.embedded_layers} layers of the embedded model"


def embedded_windows(bench: Bench) -> tuple[Tensor, Tensor]:
    """Calibration tokens and tokens held out of the embedded text."""
    tokenizer, (samples, length) = load_tokenizer(DEMO_MODEL), bench.sizes.embedded
    drawn = [
        calibration_windows(load_corpus("embedded", purpose, {}), tokenizer, rows, length, seed=0)
        for purpose, rows in (("calibration", samples), ("evaluation", bench.sizes.windows))
    ]
    return drawn[0], drawn[1]


def _size(windows: Tensor) -> str:
    return f"{windows.shape[0]} × {windows.shape[1]}"


def lora(bench: Bench) -> None:
    """Fine-tune the pruned embedded model with adapters for some steps."""
    windows, held_out = embedded_windows(bench)
    model, rows = load_embedded(bench).to(bench.device), 16
    prunekit.prune(model, ratio=0.2, method="magnitude", calibration=windows)
    before, samples = perplexity(model, held_out), rows * bench.sizes.steps
    options = [
        "eval=none",
        f"recovery.samples={samples}",
        f"recovery.length={windows.shape[1]}",
        f"recovery.batch_size={rows}",
        "recovery.holdout=0",
        "recovery.evaluations=0",
        "recovery.learning_rate=1e-3",
    ]
    tokenizer, watch = load_tokenizer(DEMO_MODEL), Stopwatch(bench.device)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        # Enough of the embedded text: all of it takes long to be made into tokens.
        text = "\n\n".join(load_corpus("embedded", "calibration", {}))
        file.write(text[: 8 * samples * windows.shape[1]])
        file.flush()
        options.append(f"recovery.path={file.name}")
        with watch.time("whole"):
            report = prunekit.recover(model, tokenizer, recovery="lora", overrides=options).report
    steps = f"{bench.sizes.steps} steps of {rows} × {windows.shape[1]} tokens"
    measured = f"{_embedded(bench)} less 20 %, {steps}"
    bench.figure("lora.whole", sum(watch.seconds()["whole"]), "s", measured)
    bench.figure("lora.whole_peak", highest_peak(report), "MB", measured)
    bench.figure("lora.before", before, "perplexity", measured)
    bench.figure("lora.after", perplexity(model, held_out), "perplexity", measured)


def start_up(bench: Bench) -> None:
    """Seconds of the command line on the embedded model, twice, and of its stages; small: of help.

    What is outside the stages are imports, the report, and the end of the process.
    """
    for turn in ("first", "second"):
        with tempfile.TemporaryDirectory() as place:
            run = Path(place, "run")
            own = ["--help"] if bench.device.type == "cpu" else ["ratio=0.2", f"output_dir={run}"]
            began = time.perf_counter()
            command = [sys.executable, "-m", "prunekit", *own]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            took, record = time.perf_counter() - began, run / "report.json"
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            stages = json.loads(record.read_text())["seconds"] if record.exists() else {}
        measured = f"python -m prunekit {own[0]}, the {turn} time"
        bench.figure(f"start_up.{turn}", took, "s", measured, aim=12)
        for stage, seconds in stages.items():
            bench.figure(f"start_up.{turn}.{stage}", seconds, "s", measured)
