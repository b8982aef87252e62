"""A recovery's adapters go on from updates that gates were trained with."""

import pytest
import torch
from recovery_helpers import logits, run, settings, small, state, texts

from prunekit.errors import ConfigError
from prunekit.gates import Training
from prunekit.jobs.updates import read_updates, write_updates
from prunekit.recovery import detach


def learned(model):
    """Low-rank updates that the weights of a model hold: its FFNs' are made so."""
    generator = torch.Generator().manual_seed(0)
    updates = {}
    for name, parameter in model.named_parameters():
        if ".mlp." in name and parameter.ndim == 2:
            up, down = (
                0.1 * torch.randn(*shape, generator=generator)
                for shape in ((len(parameter), 4), (4, parameter.shape[1]))
            )
            parameter.data += up @ down
            updates[name] = (up, down)
    return updates


def test_adapters_of_a_recovery_go_on_from_updates(tmp_path):
    model = small()
    plain, updates = state(model), learned(model)
    before, merged = logits(model), state(model)
    still = settings(texts(tmp_path), learning_rate=1e-12, epochs=0.5, evaluations=0, merge=False)
    write_updates(updates, tmp_path / "updates.safetensors")
    run(model, still, tmp_path / "a", updates=read_updates(tmp_path / "updates.safetensors"))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    for name, (up, down) in updates.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(2 * layer.lora_B["default"].weight[:, :4], up)
        torch.testing.assert_close(layer.lora_A["default"].weight[:4], down)
    for name, own in state(detach(model)).items():
        torch.testing.assert_close(own, plain[name], rtol=1e-4, atol=1e-6)
    model.load_state_dict(merged)
    with pytest.raises(ZeroDivisionError):
        run(model, settings(texts(tmp_path)), tmp_path / "b", updates=updates, watch={"w": fail})
    for name, own in state(model).items():
        torch.testing.assert_close(own, merged[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match=r"recovery\.rank: expected at least .*rank=4.*, got 2"):
        run(model, settings(texts(tmp_path), rank=2), tmp_path / "c", updates=updates)
    with pytest.raises(ConfigError, match=r"train\.merge: .*false only with rank > 0"):
        Training(merge=False)


def fail(_):
    raise ZeroDivisionError
