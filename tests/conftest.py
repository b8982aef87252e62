import contextlib
import gc
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import sharing
import torch
import yaml
from hypothesis import settings
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sharing.share_traces()
sharing.share_rehearsals()
if yaml.__with_libyaml__:  # the parser in C: Hydra reads some twenty files for each configuration
    yaml.SafeLoader = yaml.CSafeLoader
torch.set_num_threads(1)
# A collection of garbage would look at all that was imported, at each of its turns; what tests make
# is collected less often.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
_CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _CACHE.name
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
DATA = Path(
    os.environ.get("PRUNEKIT_DATA", Path(__file__).parent.parent.parent / "shared" / "data")
)


@pytest.fixture(autouse=True, scope="module")
def set_lasting_objects_aside():
    """After each module: what outlives it is not looked at for garbage again, shared graphs say."""
    yield
    gc.collect()
    gc.freeze()


def tiny_llama(
    kv_heads=4, attention="sdpa", tied=False, layers=3, heads=8, seed=0, ffn=40, **kwargs
):
    """A Llama with random weights everywhere (norms and biases too), so that nothing cancels."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=6,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=0,
        eos_token_id=1,
        **kwargs,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def token_ids(rows=4, length=9, vocabulary=97, seed=0):
    return torch.randint(
        0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def example(rows=2, length=7):
    return {"input_ids": token_ids(rows, length), "use_cache": False}


def randomise(model, scale=0.2):
    """Random numbers in every parameter and in batch norms' statistics, so that nothing cancels."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()


def inputs_of(model, name, ids):
    """What a module is fed [tokens, n], float64."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, 1).double()


def zero_units(model, graph, removed):
    """An independent mask: what reads the units is zeroed by hand; what makes them where only
    activations read them.
    """
    parameters = dict(model.named_parameters())
    for name, units in removed.items():
        group = graph[name]
        by_activations = group.kind == "head_dim" or not group.consumers
        for member in group.members:
            if member.parameter in parameters and (by_activations or member.role == "consumer"):
                parameters[member.parameter].data.index_fill_(
                    member.dim, member.index[units].flatten(), 0
                )
    return model


def zero_consumers(model, graph, removed):
    """An independent mask: the consumers' columns that the units own, zeroed by hand."""
    for name, units in removed.items():
        for member in graph[name].consumers:
            weight = model.get_parameter(member.parameter)
            for unit in units:
                weight.data.index_fill_(member.dim, member.index[unit], 0)


def interrupt_run(monkeypatch, at):
    """Let the forward pass number `at` that surgery makes for its check end in Ctrl-C."""
    from prunekit.surgery.masking import run_example

    runs = []

    def run(*arguments):
        runs.append(arguments)
        if len(runs) == at:
            raise KeyboardInterrupt
        return run_example(*arguments)

    monkeypatch.setattr("prunekit.surgery.check.run_example", run)


_SVG = "prunekit.report.pictures.Picture.svg"
_EMPTY_PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" role="img"></svg>'


def command_line(*arguments, cwd, draws=False):
    """`python -m prunekit …` in this process, which saves its start.

    Hydra would compose the configuration once more to look up `hydra.mode`, which nothing sets. The
    pictures of a report are empty unless it `draws` them. Returns what `subprocess.run` returns.
    """
    from prunekit import cli
    from prunekit.runtime import console

    out, err, before, status = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["prunekit", *map(str, arguments)]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            patch("hydra._internal.hydra.Hydra.get_mode", return_value=None),
            contextlib.nullcontext() if draws else patch(_SVG, return_value=_EMPTY_PICTURE),
        ):
            cli.main()
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = before
        console.speak(False)
    return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())


@pytest.fixture
def spoil(monkeypatch):
    """Spoil a parameter while it is cut: `spoil(name, change)`, where `change` takes its data."""

    from prunekit.surgery import cut

    def arrange(name, change):
        cut_right = cut.slice_tensor

        def cut_wrong(places, positions, changes):
            cut_right(places, positions, changes)
            module, attribute, own = places[0]
            if own == name:
                change(getattr(module, attribute).data)

        monkeypatch.setattr(cut, "slice_tensor", cut_wrong)

    return arrange


# The files that take longest start first, so that two workers end at about the same time.
LONGEST = (
    "test_families.py",
    "test_jobs.py",
    "test_site.py",
    "test_layers.py",
    "test_contract_importances.py",
    "test_config.py",
    "test_costs.py",
    "test_onnx.py",
    "test_streamed.py",
    "test_demo.py",
    "test_state.py",
    "test_cli.py",
    "test_remote_code.py",
    "test_launchers.py",
    "test_gguf.py",
    "test_search.py",
    "test_taylor.py",
    "test_benchmarks.py",
    "test_api.py",
    "test_check.py",
    "test_empty.py",
    "test_outside.py",
    "test_stream.py",
    "test_recovery_training.py",
)


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(autouse=True)
def traces(request):
    """Tests of the tracer itself trace anew; all others share the graphs of equal structures."""
    sharing.SHARES = "graph" not in request.path.parts
    yield
    sharing.SHARES = True


@pytest.fixture(scope="session")
def short_model(tmp_path_factory):
    """A folder with the first three layers of the embedded model, for what needs whole runs."""
    from prunekit.demo import DEMO_MODEL

    folder = tmp_path_factory.mktemp("short") / "model"
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, num_hidden_layers=3)
    model.save_pretrained(folder)
    for path in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def data():
    if not (DATA / "models" / "stories260K").is_dir():
        pytest.skip("PRUNEKIT_DATA (the development data) is missing")
    return DATA
