"""Models as people bring them: wrapped, dispatched, quantised."""

import copy

import pytest
import torch
from conftest import example, tiny_llama, token_ids
from torch import nn

import prunekit
from prunekit.errors import CheckpointError, DataError, TraceError
from prunekit.model.wrappers import unwrap


def prune(model):
    ids = token_ids(4, 9)
    return prunekit.prune(model, ratio=0.2, method="magnitude", calibration=ids)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [ddp, compiled, lambda m: compiled(ddp(m))])
def test_a_wrapped_model_is_pruned_and_saved_as_the_model_inside(wrap, process_group, tmp_path):
    model, plain = tiny_llama(), prune(tiny_llama())
    wrapped = wrap(model)
    assert prunekit.trace(wrapped, example()).fingerprint == plain.graph.fingerprint
    result = prune(wrapped)
    assert result.model is model and result.plan == plain.plan
    prunekit.save_pretrained(wrap(model), tmp_path / "model")
    loaded = prunekit.from_pretrained(tmp_path / "model")
    ids = token_ids(3, 9, seed=5)
    assert torch.equal(loaded(input_ids=ids).logits, plain.model(input_ids=ids).logits)


def test_a_dispatched_model_is_pruned_and_keeps_its_hooks():
    from accelerate import dispatch_model

    model = dispatch_model(tiny_llama(), {"": "cpu"}, force_hooks=True)
    hook, plain = model._hf_hook, prune(tiny_llama())
    assert prune(model).plan == plain.plan and model._hf_hook is hook
    ids = token_ids(3, 9, seed=5)
    assert torch.equal(model(input_ids=ids).logits, plain.model(input_ids=ids).logits)


def test_offloaded_weights_are_refused_in_one_line(tmp_path):
    from accelerate import cpu_offload

    model = cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    for use in (prune, unwrap, lambda m: prunekit.save_pretrained(m, tmp_path / "model")):
        with pytest.raises(TraceError, match="^LlamaForCausalLM: some of its weights are offloa"):
            use(model)


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's: that one needs an accelerator."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def test_sharded_weights_are_refused_in_one_line():
    with pytest.raises(TraceError, match="spread over processes"):
        prunekit.trace(FullyShardedDataParallel(tiny_llama()), example())


def test_quantised_weights_are_refused_in_one_line(tmp_path):
    quantised = tiny_llama()
    weight = quantised.model.layers[1].mlp.up_proj.weight
    quantised.model.layers[1].mlp.up_proj.weight = nn.Parameter(
        (weight * 100).to(torch.int8), requires_grad=False
    )
    for use in (prune, lambda m: prunekit.save_pretrained(m, tmp_path / "model")):
        with pytest.raises(TraceError, match=r"quantised \(int8\).*dequantize=True") as error:
            use(quantised)
        assert "\n" not in str(error.value)
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantised = tiny_llama()
    quantize_(quantised, Int8WeightOnlyConfig())
    with pytest.raises(TraceError, match=r"quantised \(torchao\)"):
        prune(quantised)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def with_sparse_weights():
    net = network()
    net[0].weight = nn.Parameter(net[0].weight.detach().to_sparse(), requires_grad=False)
    return net


def with_compiled_forward():
    net = network()
    net[2].forward = torch.compile(net[2].forward, backend="eager")
    return net


def compiled_in_place():
    net = network()
    net[2].compile(backend="eager")
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(network()), "it is TorchScript"),
        (lambda: nn.Sequential(nn.Linear(4, 4), compiled(network())), "1: it is compiled"),
        (with_compiled_forward, "2: it is compiled"),
        (compiled_in_place, "2: it is compiled"),
        (with_sparse_weights, "0: its weights are sparse"),
        (lambda: nn.Sequential(nn.LazyLinear(8)), "0: its weights have no shape yet"),
        (torch.inference_mode()(network), "0: its weights were made in inference mode"),
    ],
)
def test_what_can_not_be_cut_as_it_is_is_refused_in_one_line(make, message):
    with pytest.raises(TraceError, match=message):
        unwrap(make())


def test_weights_that_are_not_loaded_are_refused():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(DataError, match="it is on the meta device: expected a model that is"):
        prune(model)


def test_an_unquantised_model_is_itself():
    model = tiny_llama()
    assert unwrap(model) is model
    assert unwrap(copy.deepcopy(model).half()).dtype is torch.float16


def test_quantised_folders_need_consent(tmp_path):
    """A folder of fp8 blocks: the weights are the stored numbers times their blocks' scales."""
    import json

    from safetensors.torch import load_file, save_file

    model = tiny_llama()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    expected, tensors = load_file(path), {}
    for name, tensor in expected.items():
        tensors[name] = tensor
        if name.endswith("proj.weight"):
            rows, columns = (-(-size // 8) for size in tensor.shape)
            scales = torch.rand(rows, columns) + 0.5
            tensors[name] = (tensor * 8).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
            spread = scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
            spread = spread[: tensor.shape[0], : tensor.shape[1]]
            expected[name] = tensors[name].float() * spread
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantised \(fp8\).*model.dequantize=true"):
        prunekit.from_pretrained(tmp_path)
    loaded = prunekit.from_pretrained(tmp_path, dequantize=True, dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="can't") as error:
        prunekit.from_pretrained(tmp_path, dequantize=True)
    assert "\n" not in str(error.value)
