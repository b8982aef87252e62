"""Modes that are put back, memory that is halved, files that appear whole, devices and types."""

import json
import threading

import pytest
import torch
from torch import nn

from prunekit.errors import CheckpointError, ConfigError
from prunekit.runtime import console
from prunekit.runtime.background import Background
from prunekit.runtime.devices import compute_dtype, pick_device, pick_dtype
from prunekit.runtime.files import check_free, digest, new_folder, write_text
from prunekit.runtime.memory import (
    free_bytes,
    out_of_memory,
    peak_memory,
    reset_peak,
    run_within_memory,
    to_host,
)
from prunekit.runtime.modes import (
    at_rest,
    evaluating,
    keep_attributes,
    keep_tensors,
    restoring,
    undisturbed,
)
from prunekit.runtime.numbers import along, at_least_float32
from prunekit.runtime.processes import own_part, rank, together, world_size
from prunekit.runtime.stages import Stages

CPU = torch.device("cpu")


def layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[0].eval()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(3)
    return model


def state(model):
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
    )


@pytest.mark.parametrize("context", [evaluating, at_rest, undisturbed])
def test_a_lent_model_comes_back_as_it_was_after_an_error_too(context):
    model = layers()
    before = state(model)
    with pytest.raises(KeyError), context(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert state(model) == before


def test_undisturbed_wants_no_gradient_but_allows_them():
    model = layers()
    with torch.no_grad(), undisturbed(model):
        assert torch.is_grad_enabled()
        assert not any(p.requires_grad for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
        model[0].bias.requires_grad_(True)
    assert torch.equal(model[0].bias.grad, torch.ones(3))


def test_buffers_are_put_back_at_rest():
    model = layers()
    with at_rest(model):
        model[1].running_mean.fill_(5)
    assert torch.equal(model[1].running_mean, torch.zeros(3))


def test_what_a_forward_pass_replaces_is_put_back_at_rest():
    model = layers()
    model.kind, norm, mean = "sparse", model[1], model[1].running_mean
    with at_rest(model):
        model.kind = "full"
        model[1] = nn.Identity()
        norm.running_mean = torch.ones(3)
    assert model.kind == "sparse"
    assert model[1] is norm and norm.running_mean is mean and norm.training


def test_attributes_are_put_back_present_or_absent():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    one.forward = len
    with pytest.raises(KeyError), restoring(keep_attributes([one, other], "forward")):
        one.forward = other.forward = max
        raise KeyError
    assert one.forward is len
    assert "forward" not in vars(other)
    assert other(torch.zeros(1, 2)).shape == (1, 2)


def test_what_was_kept_first_is_put_back_last():
    tensor = torch.zeros(2)
    first = keep_tensors([tensor])
    tensor.fill_(1)
    with restoring(first, keep_tensors([tensor])):
        tensor.fill_(2)
    assert torch.equal(tensor, torch.zeros(2))


def halved(limit, error=None, size=16):
    tried, said = [], []

    def attempt(size):
        tried.append(size)
        if size > limit:
            raise error or MemoryError("can't allocate memory")
        return f"done with {size}"

    def shrink(size, error):
        if size == 1:
            raise ConfigError("one is too much") from error
        return size // 2

    def announce(before, after):
        said.append((before, after))

    return lambda: run_within_memory(attempt, size, shrink, announce), tried, said


def test_batches_are_halved_until_they_fit():
    run, tried, said = halved(5)
    assert run() == "done with 4"
    assert tried == [16, 8, 4]
    assert said == [(16, 8), (8, 4)]


def test_one_that_does_not_fit_and_other_errors_are_not_tried_again():
    run, tried, _ = halved(0)
    with pytest.raises(ConfigError, match="one is too much"):
        run()
    assert tried == [16, 8, 4, 2, 1]
    run, tried, said = halved(5, RuntimeError("shapes don't match"))
    with pytest.raises(RuntimeError, match="shapes don't match"):
        run()
    assert (tried, said) == ([16], [])


def test_errors_that_say_memory_ran_out():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_peak_and_free_memory_are_bytes():
    reset_peak(CPU)
    before = peak_memory(CPU)
    held = torch.ones(8 << 20)
    assert peak_memory(CPU) >= before
    assert held.nbytes < peak_memory(CPU) < 1 << 45
    assert free_bytes(CPU) > 1 << 20


def test_host_memory_holds_a_tensor_as_it_is_stored():
    tensor = torch.randn(6, 4)
    assert to_host(tensor) is tensor
    other = to_host(tensor.T, torch.bfloat16)
    assert other.is_contiguous() and torch.equal(other, tensor.T.to(torch.bfloat16))


def test_work_beside_gives_its_result_or_its_error_to_whoever_asks():
    background, ran = Background("prunekit-test"), []
    assert background.result() is None

    def work():
        ran.append(threading.current_thread().name)
        return 3

    background.begin(work)
    assert background.result() == 3 and background.result() is None
    assert ran[0].startswith("prunekit-test")

    def fails():
        raise CheckpointError("no")

    background.begin(fails)
    with pytest.raises(CheckpointError, match="no"):
        background.result()
    background.begin(fails)
    background.settle()
    assert background.result() is None


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("all")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "all"
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        check_free(tmp_path / "model")


def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(CheckpointError, match="model: can't be written: .*No space left"),
        new_folder(tmp_path / "model"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_small_files_are_replaced_whole(tmp_path):
    write_text(tmp_path / "plan.json", json.dumps({"a": 1}))
    write_text(tmp_path / "plan.json", "{}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]
    with pytest.raises(CheckpointError, match="can't be written"):
        write_text(tmp_path / "missing" / "plan.json", "{}")


def test_digests_tell_parts_from_one_another():
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest(["ab"]) == digest([b"ab"])
    assert len(digest([])) == 32


def test_devices_and_types_by_name():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="device: expected auto, cpu, .*, got .abacus"):
        pick_device("abacus")
    with pytest.raises(ConfigError, match="device: expected one that holds numbers, .* 'meta'"):
        pick_device("meta")
    assert (pick_dtype("auto"), pick_dtype("float16")) == (None, torch.float16)
    with pytest.raises(ConfigError, match="dtype: unknown 'int3'; available: auto"):
        pick_dtype("int3")


def test_half_precision_computes_in_float32_on_a_cpu_alone():
    gpu = torch.device("cuda")
    assert compute_dtype(torch.bfloat16, CPU) == compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(torch.float64, CPU) == torch.float64
    assert compute_dtype(torch.bfloat16, gpu) == torch.bfloat16


def test_half_precision_is_widened_before_it_is_summed():
    ones = torch.ones(3000, 2, dtype=torch.float16)
    assert along(ones, 1).tolist() == [3000, 3000]
    assert along(ones[:, 0], 0).dtype == torch.float64
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    widened = [torch.float32, torch.float32, torch.float32, torch.float64]
    assert [at_least_float32(torch.ones(1, dtype=dtype)).dtype for dtype in types] == widened


def test_one_process_works_on_everything():
    assert (rank(), world_size(), own_part([1, 2, 3])) == (0, 1, [1, 2, 3])
    with pytest.raises(ConfigError, match="mine"), together():
        raise ConfigError("mine")


def test_seconds_of_a_stage_add_up():
    stages = Stages(CPU)
    for _ in range(2):
        with stages("prune"):
            pass
    assert stages.seconds["prune"] >= 0
    assert stages.peak_memory_bytes["prune"] > 0


def test_a_library_call_says_nothing(capsys):
    console.say("hello [bold]")
    assert list(console.track([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr().out == ""
    console.speak()
    try:
        console.say("hello [bold]")
    finally:
        console.speak(False)
    assert capsys.readouterr().out == "hello [bold]\n"
