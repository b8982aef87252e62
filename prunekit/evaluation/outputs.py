"""How far each layer's output is from the dense model's: ‖a − b‖² / ‖a‖² over some tokens of a
text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit.model.inputs import input_device
from prunekit.runtime.modes import evaluating


def layers_of(model: nn.Module) -> nn.ModuleList | None:
    """The model's stack of layers: the module list with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=None)


@torch.inference_mode()
def layer_outputs(
    model: nn.Module, windows: Tensor, device: torch.device | str | None = None
) -> list[Tensor]:
    """What each layer leaves of the residual stream [N, T, hidden], in host memory, for token
    windows [N, T].
    """
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach().cpu())

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model) or ()]
    try:
        with evaluating(model):
            for window in windows:
                model(input_ids=window[None].to(device or input_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(found[i :: len(hooks)]) for i in range(len(hooks))]


def relative_errors(dense: list[Tensor], pruned: list[Tensor]) -> list[float]:
    """‖a − b‖² / ‖a‖² of each pair of outputs; none where layers or widths don't pair."""
    if [a.shape for a in dense] != [b.shape for b in pruned]:
        return []
    pairs = ((a.double(), b.double()) for a, b in zip(dense, pruned, strict=True))
    return [((a - b).square().sum() / a.square().sum().clamp_min(1e-300)).item() for a, b in pairs]
