r"""How far each layer's output is from the dense model's: $\|a - b\|^2 / \|a\|^2$ over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.model.inputs import input_device
from prunekit.model.stack import hidden_of_output, main_stack
from prunekit.runtime.modes import evaluating


@torch.inference_mode()
def layer_outputs(
    model: nn.Module, windows: Tensor, device: torch.device | str | None = None
) -> list[Tensor]:
    """The output of each layer, [N, T, hidden] in host memory.

    Args:
        model: a causal language model.
        windows: int64 [N, T], one forward pass each.
        device: where inputs go; by default where the model wants them.
    """
    layers = list(main_stack(model) or ())
    outputs: list[list[Tensor]] = [[] for _ in layers]

    def keep_in(outputs_of_layer: list[Tensor]) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = hidden_of_output(output)
            assert hidden is not None
            outputs_of_layer.append(hidden.detach().cpu())

        return hook

    hooks = [
        layer.register_forward_hook(keep_in(own))
        for layer, own in zip(layers, outputs, strict=True)
    ]
    try:
        with evaluating(model):
            for window in windows:
                model(input_ids=window[None].to(device or input_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(own) for own in outputs]


def relative_errors(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> list[float]:
    """‖a − b‖² / ‖a‖² of each pair of outputs; empty where numbers of layers or widths differ."""
    if [a.shape for a in dense] != [b.shape for b in pruned]:
        return []
    errors: list[float] = []
    for a, b in zip(dense, pruned, strict=True):
        energy = a.double().square().sum().clamp_min(1e-300)
        errors.append(((a.double() - b.double()).square().sum() / energy).item())
    return errors
