"""What training gates takes beside weights, without numbers: a 7B model fits in 24 GB."""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit.calibration.gradients.state import recomputing
from prunekit.gates import gated
from prunekit.gates.loss import gated_loss
from prunekit.gates.places import _Inputs


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once, and their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return output

    def note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.leave, key, size)

    def leave(self, key, size):
        self.seen.discard(key)
        self.now -= size


def peak_of_a_step(layers, rows, length, recomputes):
    """Bytes that a step takes on a model of LLaMA-7B's widths in bfloat16, weights included."""
    config = LlamaConfig(num_hidden_layers=layers, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        model = LlamaForCausalLM._from_config(config).eval().requires_grad_(False)
        live.peak = live.now
        batch = {"input_ids": torch.zeros(rows, length, dtype=torch.long), "use_cache": False}
        gates, values = [], {}
        for number, layer in enumerate(model.model.layers):
            for module, units in ((layer.self_attn.o_proj, 32), (layer.mlp.down_proj, 11_008)):
                name = f"{number} {units}"
                owner = torch.arange(units).repeat_interleave(module.in_features // units)
                gates.append(_Inputs(group=name, module=module, unit_of=owner))
                values[name] = torch.ones(units, requires_grad=True)
        with torch.no_grad():
            dense = model(**batch).logits
        with recomputing(model, recomputes), gated(gates, values):
            gated_loss(model, batch, dense, 0.0, 1.0)[0].backward()
        assert all(value.grad is not None for value in values.values())
        assert all(parameter.grad is None for parameter in model.parameters())
        return live.peak


def test_a_7b_model_with_its_gates_fits_in_24_gb():
    """Rows of 2,048 tokens, four at a time; each layer adds its weights and what goes into it."""
    one, two, three = (peak_of_a_step(layers, 4, 2048, True) for layers in (1, 2, 3))
    layer = three - two
    assert abs(layer - (two - one)) < 1e6
    assert 20e9 < three + 29 * layer < 24e9
    assert peak_of_a_step(3, 4, 2048, False) > three + 2e9  # without recomputing
