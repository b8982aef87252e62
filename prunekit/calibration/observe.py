"""The inputs of a group's consumers, gathered over the batches.

Consumers that are fed the same inputs (q, k and v, or gate and up) form a site, and share one set
of moments.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit.calibration.activations import InputSums
from prunekit.calibration.consumers import Consumer
from prunekit.calibration.moments import Moments
from prunekit.calibration.weighting import EQUAL, Weighting
from prunekit.data.batches import Batch, count_positions
from prunekit.errors import TraceError
from prunekit.runtime.console import say
from prunekit.runtime.numbers import at_least_float32

TokenWeights = tuple[Tensor | None, Tensor | None]  # of the moments [B, T], and for choosing
HELD_OUT = 8  # every eighth sample is held out, to measure whether a target generalises


@dataclass(eq=False)
class Site:
    """Consumers that are fed the same inputs x [n], and the moments of x.

    `held`: the moments of the held-out samples, which are not in `moments`; None without a target.
    `choosing`: the moments of all samples by which units are chosen, where tokens are weighed
    otherwise for that; None where they are the others'. `metric` [d, d] or [d]: how errors of the
    outputs are weighed for choosing units, as Σ δ δᵀ or Σ δ² of their gradients; None: all alike.
    """

    consumers: list[Consumer]
    moments: Moments
    held: Moments | None = None
    choosing: Moments | None = None
    metric: Tensor | None = None

    def parts(self) -> list[Moments]:
        """All moments of the site."""
        parts = (self.moments, self.held, self.choosing)
        return [part for part in parts if part is not None]

    def weight(self) -> Tensor:
        """The weights of all consumers, below one another: [d, n], a copy in float32 at least."""
        return torch.cat([consumer.weight() for consumer in self.consumers]).to(
            self.moments.hessian.device
        )

    def sum_inputs(self) -> InputSums:
        """The sums of the inputs over all samples that units are chosen by, while there are H."""
        parts = [self.choosing] if self.choosing else [self.moments, self.held]
        sums = InputSums()
        for part in parts:
            if part is not None:
                sums.tokens += part.tokens
                sums.total = sums.total + part.mean.double() * part.tokens
                sums.squares = sums.squares + part.hessian.diagonal().double() * part.tokens
        return sums

    def merge_held_out(self) -> None:
        """Merge the held-out moments into `moments`; the matrices of both parts are let go of."""
        if self.held is not None:
            self.moments, self.held = Moments.together([self.moments, self.held]), None

    def energy(self, weight: Tensor | None = None) -> float:
        """E‖W x‖²: the error that removing all columns would leave; of another W if it is given."""
        weight = self.weight() if weight is None else weight
        return float(((weight @ self.moments.hessian.to(weight)) * weight).sum())


@dataclass(frozen=True)
class Fed:
    """Inputs as a consumer was fed them: a tensor, and how often it had been written to."""

    inputs: Tensor
    version: int

    @property
    def is_as_it_was(self) -> bool:
        """Whether nothing has written to the tensor since."""
        return self.inputs._version == self.version

    def is_one_of(self, others: Sequence[Fed]) -> bool:
        """Whether it is the same tensor, with the same values, as one of others."""
        return any(self.inputs is o.inputs and self.version == o.version for o in others)


@dataclass
class Observation:
    """Gathers the moments of all inputs of a group's consumers.

    `targeted`: whether the consumers have a target; samples are then held out, and the errors of
    the outputs are gathered with the inputs. `weighting`: of the moments; `choosing`: of those by
    which units are chosen, if that is another one; `metric`: see `Site`.
    """

    consumers: Sequence[Consumer]
    targeted: bool = False
    weighting: Weighting = EQUAL
    choosing: Weighting | None = None
    metric: Tensor | None = None
    sites: dict[Consumer, Site] = field(default_factory=dict)
    regrouped: bool = False  # whether tokens came in other places than their weights have

    @contextmanager
    def of(
        self,
        sample: int,
        batch: Batch,
        wanted: Tensor | None = None,
        weights: TokenWeights = (None, None),
    ) -> Iterator[None]:
        """Inside the `with` block, the consumers are fed this batch.

        Args:
            sample: the number of the batch's first calibration sample.
            batch: the keyword arguments of the forward call, without padding.
            wanted: the target of a lone consumer [..., d], if it has one.
            weights: of the tokens [B, T], for the moments and for choosing; None: all are alike.
        """
        self._weights = weights
        self._positions = count_positions(batch)
        self._sample = sample
        self._wanted: Tensor | None = wanted
        self._times = Counter[Consumer]()  # how often each was fed
        self._fed: dict[Site, list[Fed]] = {}  # what the first consumer of each site was fed
        self._opened: set[Site] = set()
        yield
        for consumer, site in list(self.sites.items()):
            if (times := self._times[consumer]) < len(self._fed.get(site, ())):
                self._part(consumer, site, times)
        self._fed.clear()
        self._wanted = None  # memory outside of the store is needed for one batch at a time only

    def see(self, consumer: Consumer, inputs: Tensor) -> None:
        """Take in the inputs [..., n] of a consumer, and the errors [..., d] of its outputs."""
        fed = Fed(inputs, inputs._version)
        site = self.sites.get(consumer) or self._find_site(consumer, fed)
        times = self._times[consumer]
        self._times[consumer] += 1
        if site.consumers[0] is not consumer:
            if fed.is_one_of(self._fed.get(site, [])[times : times + 1]):
                return  # the first consumer of the site has taken in the same inputs
            site = self._part(consumer, site, times)
        self._fed.setdefault(site, []).append(fed)
        self._add(site, inputs)

    def _part(self, consumer: Consumer, site: Site, times: int) -> Site:
        """Give a consumer that was fed as a site's first one, but for now, a site of its own.

        Raises:
            TraceError: what it was fed is not at hand any more.
        """
        before = self._fed.get(site, [])[:times]
        if site not in self._opened or not all(fed.is_as_it_was for fed in before):
            raise TraceError(
                f"{consumer.name}: layer-wise pruning expects it to be fed the inputs of "
                f"{site.consumers[0].name}, as at first, in all batches; in a later one it was not"
            )
        site.consumers.remove(consumer)
        own = self._open_site(consumer)
        for fed in before:
            self._add(own, fed.inputs)
        self._fed[own] = before
        return own

    def _add(self, site: Site, inputs: Tensor) -> None:
        """Add inputs [B, T, n], or [rows, n] where tokens were regrouped, to the moments.

        Which tokens an expert gets is not known, even where they are as many as all of them.
        """
        if inputs.ndim == 2 and len(inputs) == math.prod(self._positions):
            inputs = inputs.view(*self._positions, -1)
        places = None if site.consumers[0].expert is not None else inputs.shape[:-1]
        weights, for_choosing = (_place_weights(own, places) for own in self._weights)
        self.regrouped |= (weights is None) != (self._weights[0] is None)
        samples = range(self._sample, self._sample + len(inputs))
        if site.choosing is not None:
            site.choosing.add(inputs, None, samples, for_choosing)
        if self._wanted is None or site.held is None:
            site.moments.add(inputs, None, samples, weights)
            return
        output = site.consumers[0].multiply(inputs)
        error = at_least_float32(self._wanted.reshape(output.shape)) - output
        for moments, held in ((site.moments, False), (site.held, True)):
            rows = [i for i, n in enumerate(samples) if (n % HELD_OUT == HELD_OUT - 1) == held]
            part, lost, weigh = (
                None if one is None else runs_of_rows(one, rows) for one in (inputs, error, weights)
            )
            assert part is not None
            moments.add(part, lost, [samples[i] for i in rows], weigh)

    def _find_site(self, consumer: Consumer, fed: Fed) -> Site:
        """The site of other consumers that were fed this very tensor, or a new one."""
        for site in self._opened:
            alike = torch.equal(site.consumers[0].member.index, consumer.member.index)
            if alike and fed.is_one_of(self._fed[site][:1]):
                site.consumers.append(consumer)
                self.sites[consumer] = site
                return site
        return self._open_site(consumer)

    def _open_site(self, consumer: Consumer) -> Site:
        """A site of this consumer alone, whose moments are still empty."""
        weight = consumer.parameter
        size = weight.shape[consumer.member.dim]

        def open_moments(weighting: Weighting, outputs: int | None) -> Moments:
            weighted = weighting.tokens != "equal"
            name, device, dtype = consumer.name, weight.device, weight.dtype
            return Moments(size, name, device, dtype, outputs, weighted)

        outputs = consumer.outputs if self.targeted else None
        self.sites[consumer] = Site(
            [consumer],
            open_moments(self.weighting, outputs),
            open_moments(self.weighting, outputs) if self.targeted else None,
            None if self.choosing is None else open_moments(self.choosing, None),
            self.metric,
        )
        self._opened.add(self.sites[consumer])
        return self.sites[consumer]

    def check(self) -> None:
        """Wait for the device once, and look at all that the consumers were fed.

        Raises:
            DataError: NaN or infinity was among it.
        """
        sites = list(dict.fromkeys(self.sites.values()))
        parts = [part for site in sites for part in site.parts()]
        sound = [one for part in parts for one in part.look()]
        if sound and not torch.stack(sound).all():
            for part in parts:
                part.check()

    def finish(self) -> list[Site]:
        """The sites with their moments over all processes, in the order of their consumers.

        A consumer that was fed nothing in any process gets moments of no token. A stacked expert
        that was routed fewer tokens than it has inputs gets the moments of all experts together.
        """
        for consumer in self.consumers:
            if consumer not in self.sites:
                self._open_site(consumer)
        sites = list(dict.fromkeys(self.sites[consumer] for consumer in self.consumers))
        for site in sites:
            for part in site.parts():
                part.finish()
        _share_moments(sites)
        return sites


def _place_weights(weights: Tensor | None, places: torch.Size | None) -> Tensor | None:
    """The weights of the tokens at these places [B, T]; None where they are others' weights."""
    if weights is None or places is None:
        return None
    if weights.shape == (math.prod(places),):
        weights = weights.view(places)
    return weights if weights.shape == places else None


def runs_of_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows of a tensor, which ascend; a view where they follow one another.

    The numbers of the rows do not go to the device, which would have to be waited for.
    """
    ends = [i for i, row in enumerate(rows) if i + 1 == len(rows) or rows[i + 1] != row + 1]
    starts = [0, *(end + 1 for end in ends)]
    runs = [tensor[rows[a] : rows[b] + 1] for a, b in zip(starts, ends, strict=False)]
    return tensor[:0] if not runs else runs[0] if len(runs) == 1 else torch.cat(runs)


def _share_moments(sites: Sequence[Site]) -> None:
    """Give stacked experts that saw too few tokens one and the same moments of all experts."""
    for module in {
        site.consumers[0].module for site in sites if site.consumers[0].expert is not None
    }:
        own = [site for site in sites if site.consumers[0].module is module]
        short = [s for s in own if s.moments.tokens < len(s.moments.hessian)]
        if not short:
            continue
        shared = Moments.together([site.moments for site in own])
        experts = ", ".join(f"{s.consumers[0].expert} ({s.moments.tokens})" for s in short)
        say(
            f"{own[0].moments.name}: experts that saw fewer tokens than they have inputs take the "
            f"moments of all {shared.tokens:,} routed tokens: {experts}"
        )
        choosing = own[0].choosing and Moments.together([s.choosing for s in own if s.choosing])
        for site in short:
            site.moments, site.choosing = shared, choosing
