"""What stacked experts add to the tokens that a router sends them, from one pass over the batches.

Experts are a module that is called with the hidden states of tokens, the experts chosen for each
token and their gates, as those of transformers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.padding import remove_padding
from prunekit.data.batches import Batch
from prunekit.errors import DataError, TraceError
from prunekit.model.inputs import without_cache
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed
from prunekit.runtime.numbers import at_least_float32


@dataclass
class ExpertSums:
    """Sums over the tokens that were sent to each expert of a module, in float64 on its device.

    The last entry of both takes what is sent to no expert of the module (an identity, say).

    Args:
        module: path of the module.
        experts: how many experts it holds, E.
    """

    module: str
    experts: int
    tokens: Tensor = field(init=False)
    norms: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = torch.zeros(self.experts + 1, dtype=torch.float64)
        self.norms = torch.zeros(self.experts + 1, dtype=torch.float64)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the module, which computes each of a token's experts by itself."""
        hidden, chosen, gates = self._read_call([*args, *kwargs.values()])
        self.tokens, self.norms = self.tokens.to(chosen.device), self.norms.to(chosen.device)
        for slot in range(chosen.shape[1]):
            one = slice(slot, slot + 1)
            added = module.forward(hidden, chosen[:, one], gates[:, one])  # without its hooks
            norms = at_least_float32(added).norm(dim=-1).double()
            sent = chosen[:, slot].clamp(max=self.experts)
            self.norms.index_add_(0, sent, norms)
            self.tokens.index_add_(0, sent, torch.ones_like(norms))

    def _read_call(self, given: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, n], chosen experts int64 [N, k] and gates [N, k], told by their types.

        Raises:
            TraceError: the module is called in another way.
        """
        tensors = [value for value in given if isinstance(value, Tensor)]
        chosen = [tensor for tensor in tensors if tensor.dtype in (torch.int64, torch.int32)]
        real = [tensor for tensor in tensors if tensor.is_floating_point()]
        if len(tensors) == 3 and len(chosen) == 1 and len(real) == 2:
            hidden, gates = real
            if gates.shape == chosen[0].shape and len(hidden) == len(gates) and gates.ndim == 2:
                return hidden, chosen[0].long(), gates
        shapes = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
        raise TraceError(
            f"{self.module}: expected experts that are called with hidden states [tokens, width], "
            f"the chosen experts and their gates [tokens, choices]; they get {shapes}"
        )

    def means(self) -> Tensor:
        """The mean norm of what each expert adds to a token, float64 [E] on the CPU.

        0 of an expert that no token was sent to.

        Raises:
            DataError: there is NaN or infinity in it.
        """
        means = (self.norms / self.tokens.clamp(min=1))[: self.experts].cpu()
        if not means.isfinite().all():
            raise DataError(f"{self.module}: what its experts add holds NaN or infinity")
        return means


def gather_expert_sums(
    model: nn.Module, experts: Mapping[str, int], batches: Sequence[Batch]
) -> dict[str, ExpertSums]:
    """Gather what experts add, gate · output, over the calibration set; padding does not count.

    Args:
        model: the model; it is left as it was, and runs in evaluation mode.
        experts: path of a module of experts → how many it holds.
        batches: the calibration set, keyword arguments of forward calls.

    Returns:
        Path of the module → sums.

    Raises:
        TraceError: a module of experts is called in a way that is not known.
    """
    sums = {path: ExpertSums(path, number) for path, number in experts.items()}
    with undisturbed(model), ExitStack() as stack, torch.no_grad():
        for path, own in sums.items():
            module = model.get_submodule(path)
            hook = module.register_forward_pre_hook(own.see, with_kwargs=True)
            stack.callback(hook.remove)
        rows = remove_padding(model, batches)
        for batch in track(rows, "experts", len(rows)):
            model(**without_cache(model, batch))
    return sums
