"""Taps: the inputs and the output gradients of a linear module, read in the backward pass.

y = x Wᵀ + b  ⇒  ∂L/∂W = Σ_t δ_t x_tᵀ, ∂L/∂b = Σ_t δ_t, with δ = ∂L/∂y. The weight stays frozen, so
that autograd computes no gradient of it: whoever taps computes the part that is needed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Keep = Callable[[Tensor], Tensor]
Receive = Callable[[Tensor, Tensor], None]


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a module of one input, by position or by its name."""
    return next(iter((*args, *kwargs.values())))


def tap(module: nn.Module, keep: Keep, receive: Receive) -> RemovableHandle:
    """Have `receive(keep(x), δ)` called in each backward pass, once for each call of the module.

    x [..., in] is the input of the module, δ [..., out] the gradient of its output. Only keep(x) is
    held until then, and it is computed again where gradient checkpointing computes all else again.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        x = input_of(args, kwargs)
        with torch.no_grad():
            kept = keep(x)
        return _Tap.apply(
            output, kept, torch.zeros((), device=output.device, requires_grad=True), receive
        )

    return module.register_forward_hook(hook, with_kwargs=True, prepend=True)


class _Tap(torch.autograd.Function):
    """The identity on `output`, which requires a gradient because the `anchor` does."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, kept: Tensor, anchor: Tensor, receive: Receive) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.receive = receive
        ctx.mark_dirty(output)  # the same tensor and no view: the model may write to it
        return output

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        ctx.receive(*ctx.saved_tensors, delta)
        return delta, None, None, None
