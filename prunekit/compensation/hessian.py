"""Streaming second moments of a layer's inputs: H = X Xᵀ / tokens, the Hessian of the layer's squared error."""

import torch
from torch import Tensor

from prunekit.errors import DataError


class Moments:
    """Running means of x xᵀ and of x over tokens, float32, on the inputs' device.

    Args:
        size: number of input features n.
        name: of the layer, for messages.
    """

    def __init__(self, size: int, name: str, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.tokens = 0
        self.hessian = torch.zeros(size, size, device=device)
        self.mean = torch.zeros(size, device=device)

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Take in inputs [..., n]; `mask` [...] is False at positions that don't count (padding).

        Raises:
            DataError: NaN or infinity among them.
        """
        x = inputs.flatten(0, -2) if mask is None else inputs[mask]
        x = x.float()
        new = self.tokens + len(x)
        product = x.T @ x
        if not torch.isfinite(product.diagonal()).all():
            raise DataError(f"{self.name}: its inputs hold NaN or infinity (after {self.tokens:,} calibration tokens)")
        self.hessian.mul_(self.tokens / max(new, 1)).add_(product, alpha=1 / max(new, 1))
        self.mean.mul_(self.tokens / max(new, 1)).add_(x.sum(0), alpha=1 / max(new, 1))
        self.tokens = new
