"""Random consumers and their inputs, and the independent answers that the solver's are held
against.
"""

import torch

from prunekit.obs.inverse import Problem


def inputs(n=24, d=10, tokens=200, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, rank or n, generator=generator, dtype=torch.float64) @ mix
    w = torch.randn(d, n, generator=generator, dtype=torch.float64)
    return x, w, x.T @ x / tokens


def collinear(n, seed, noise=0.3):
    """A Hessian whose inputs share n/4 factors, and a weight [n/3, n]: float64."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(4 * n, n // 4, generator=generator, dtype=torch.float64)
    x = factors @ torch.randn(n // 4, n, generator=generator, dtype=torch.float64) / (n / 4) ** 0.5
    x += noise * torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
    x *= torch.randn(n, generator=generator, dtype=torch.float64).exp()
    return x.T @ x / len(x), torch.randn(n // 3, n, generator=generator, dtype=torch.float64)


def single(w, a):
    return Problem(weight=w, inverse=a, index=torch.arange(w.shape[1])[:, None])


def error(x, before, after):
    return ((x @ (after - before).T) ** 2).sum().item() / len(x)


def loss(h, before, after):
    """tr((W' − W) H (W' − W)ᵀ)."""
    change = after.double() - before.double()
    return ((change @ h) * change).sum().item()


def optimum(x, w, kept):
    """The least-squares optimum by an independent solver: min over V of ‖x[:, kept] Vᵀ − x wᵀ‖."""
    full = torch.zeros_like(w)
    full[:, kept] = torch.linalg.lstsq(x[:, kept], x @ w.T, driver="gelsd").solution.T
    return full


def left_error(h, w, removed):
    """The least error of removing columns, from the Schur complement of H itself."""
    kept = [i for i in range(len(h)) if i not in set(removed)]
    rest = h[removed][:, removed]
    if kept:
        rest = rest - h[removed][:, kept] @ torch.linalg.solve(
            h[kept][:, kept], h[kept][:, removed]
        )
    return ((w[:, removed] @ rest) * w[:, removed]).sum().item()


def peak(function):
    """Bytes that a call holds at most beside what was there before, its results among them."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
