"""The token weights of each group, batch by batch, from wherever they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunekit.calibration.consumers import Consumer
from prunekit.calibration.observe import TokenWeights
from prunekit.calibration.token_norms import Norms, OutputGradients, gather_gradients
from prunekit.calibration.weighting import EQUAL, Outputs, Weighting
from prunekit.data.batches import Numbered, count_positions
from prunekit.runtime.console import say
from prunekit.runtime.processes import add_up, together

OWN_NORM = (
    "there is no residual stream with norms behind the block: the norm of its own output is taken "
    "for the weights of tokens"
)


@dataclass(frozen=True, kw_only=True)
class Weigher:
    """Gives each group the weights of all tokens.

    `weighting`: of the moments; `choosing`: of those by which units are chosen, if that is another
    one. `gradients`: group name → those of its consumer's output, where they are asked for.
    """

    weighting: Weighting = EQUAL
    choosing: Weighting | None = None
    batches: Sequence[Numbered] = ()
    gradients: Mapping[str, OutputGradients] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls,
        model: nn.Module,
        consumers: Mapping[str, Sequence[Consumer]],
        batches: Sequence[Numbered],
        weighting: Weighting,
        choosing: Weighting | None,
        outputs: Outputs = "equal",
    ) -> Weigher:
        """Take the gradients of the dense model, where a weighting, or `outputs`, asks for them."""
        weighting = weighting.settled()
        choosing = None if choosing is None else choosing.settled()
        choosing = None if choosing == weighting else choosing
        gradients: dict[str, OutputGradients] = {}
        asked = any(one and one.tokens == "gradient" for one in (weighting, choosing))
        with together():
            if asked or outputs != "equal":
                own = [batch for _, batch in batches]
                gradients = gather_gradients(model, lone(consumers), own, outputs)
        for gradient in gradients.values():
            if gradient.products is not None:
                add_up(gradient.products)
        return cls(weighting=weighting, choosing=choosing, batches=batches, gradients=gradients)

    @property
    def needs_norms(self) -> bool:
        """Whether a weighting comes from norms in the dense model."""
        return any(one is not None and one.needs_norms for one in (self.weighting, self.choosing))

    def weigh(self, name: str, find_norms: Callable[[], Norms | None]) -> list[TokenWeights]:
        """The token weights of a group in each batch: for the moments, and for choosing.

        `find_norms` is called where a weighting comes from norms; None: the group has none.
        """
        norms = find_norms() if self.needs_norms else None
        first = self._weigh(self.weighting, name, norms)
        second = self._weigh(self.choosing or EQUAL, name, norms)
        return list(zip(first, second, strict=True))

    def _weigh(
        self, weighting: Weighting, name: str, norms: Norms | None
    ) -> Sequence[Tensor | None]:
        if weighting.tokens == "without_first":
            batches = [batch for _, batch in self.batches]
            device = next(v.device for v in batches[0].values() if isinstance(v, torch.Tensor))
            shapes = [count_positions(batch) for batch in batches]
            return weighting.of_positions(shapes, device)
        squares = norms
        if weighting.tokens == "gradient":
            squares = self.gradients[name].norms if name in self.gradients else None
        if weighting.tokens == "equal":
            return [None] * len(self.batches)
        if squares is None:
            self.say_once(name, "there is no single output of each token: all weigh the same")
            return [None] * len(self.batches)
        if weighting.tokens == "gradient":
            return squares
        return weighting.of_norms(squares)

    def metric_of(self, name: str) -> Tensor | None:
        """Σ δ δᵀ [d, d] or Σ δ² [d] of the outputs of a group's consumer; None: all are alike."""
        return self.gradients[name].products if name in self.gradients else None

    def say_once(self, name: str, what: str) -> None:
        """Say of the first group for which it holds, and of others like it."""
        if what not in self.said:
            self.said.add(what)
            say(f"{name}, and others like it: {what}")


def lone(consumers: Mapping[str, Sequence[Consumer]]) -> dict[str, Consumer]:
    """Group name → its consumer, of groups that have a single one whose module is linear."""
    return {name: own[0] for name, own in consumers.items() if len(own) == 1 and own[0].is_linear}
