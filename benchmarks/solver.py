"""How long choosing columns takes against inverting the Hessian it works on; times and ratios of
one run, medians.

    python benchmarks/solver.py                        # LLaMA-7B's down_proj: n = 11,008, d = 4,096
    python benchmarks/solver.py --n 1024 --d 384       # a minute's check; add --repeats 1 for a
    quick one
    python benchmarks/solver.py --device cuda          # the same on a GPU

The inputs share a few factors, in a different scale each; the variance inflation factors are some
tens. Beside the greedy choice: groups, the released code's schedule as it runs there (the Hessian
of what is left is inverted for every group; once, at 20 %), and the naive loop that updates W and A
at every column, at two smaller sizes for its growth.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from page import environment, write
from torch import Tensor

from prunekit.obs.choose import Groups, choose_columns, released_sizes
from prunekit.obs.inverse import Problem, invert

SHARES = (0.2, 0.5)
GROUPS: tuple[Groups, ...] = ("greedy", "dynamic_group", "released_group", "fixed_group")


def case(n: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """H [n, n] and W [d, n]; one part in ten of an input's variance is its own."""
    generator = torch.Generator().manual_seed(n)
    mixing = torch.randn(n // 4, n, generator=generator, dtype=dtype).div_((n / 4) ** 0.5)
    hessian = torch.mm(mixing.T, mixing)
    hessian.diagonal().add_(0.1)
    scales = torch.randn(n, generator=generator, dtype=dtype).exp_()
    hessian.mul_(scales[:, None]).mul_(scales)
    weight = torch.randn(d, n, generator=generator, dtype=dtype)
    return hessian.to(device), weight.to(device)


def timed(function: Callable[[], object]) -> float:
    _wait()
    began = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def plain_inverse(hessian: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def reinverting(hessian: Tensor, weight: Tensor, count: int) -> None:
    """The released code's schedule: invert, remove a group and repair W, cut H, invert again."""
    for size in released_sizes(count):
        inverse = plain_inverse(hessian)
        order = (weight.square().sum(0) / inverse.diagonal()).argsort()
        gone, kept = order[:size], order[size:]
        update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
        weight = weight[:, kept] - weight[:, gone] @ update
        hessian = hessian[kept][:, kept]


def naive(weight: Tensor, inverse: Tensor, count: int) -> None:
    """One column at a time, W [d, n] and A [n, n] updated after each."""
    w, a = weight.clone(), inverse.clone()
    for _ in range(count):
        p = int((w.square().sum(0) / a.diagonal()).argmin())
        row = a[p] / a[p, p]
        w -= torch.outer(w[:, p], row)
        a -= torch.outer(a[:, p], row)
        w[:, p], a[p, p] = torch.inf, 1


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a busy moment is everybody's."""
    turns = [
        {name: timed(function) for name, function in functions.items()} for _ in range(repeats + 1)
    ]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in functions}


def measure(
    n: int, d: int, dtype: torch.dtype, device: str, repeats: int, baseline: bool
) -> Iterator[dict]:
    """A row for each share; `baseline`: with the schedule that inverts again."""
    hessian, weight = case(n, d, dtype, device)
    inverse = invert(hessian)
    assert (inverse.matrix.dtype, inverse.damping) == (dtype, 0), (
        "the Hessian should be one that this dtype inverts"
    )
    problem = Problem(
        weight=weight, inverse=inverse.matrix, index=torch.arange(n, device=device)[:, None]
    )
    for share in SHARES:
        count = int(share * n)
        functions: dict[str, Callable[[], object]] = {"inversion": lambda: plain_inverse(hessian)}
        functions["invert"] = lambda: invert(hessian)
        functions["greedy"] = lambda count=count: choose_columns([problem], count)
        seconds = medians(functions, repeats)
        for groups in GROUPS[1:]:
            seconds[groups] = timed(
                lambda groups=groups, count=count: choose_columns([problem], count, groups)
            )
        if baseline and share == SHARES[0]:  # many inversions: once is long enough
            seconds["reinverting"] = timed(lambda count=count: reinverting(hessian, weight, count))
        yield {
            "n": n,
            "d": d,
            "dtype": str(dtype).removeprefix("torch."),
            "share": share,
            "seconds": seconds,
        }


def growth(n: int, d: int, device: str, repeats: int) -> dict:
    """The naive loop and greedy at two smaller sizes, 20 % of the columns, and the exponents of
    their growth with n.
    """
    rows = []
    for size in (n // 2, n):
        hessian, weight = case(size, d * size // n, torch.float32, device)
        inverse = invert(hessian).matrix
        index = torch.arange(size, device=device)[:, None]
        problem = Problem(weight=weight, inverse=inverse, index=index)
        count = size // 5
        functions = {
            "greedy": lambda problem=problem, count=count: choose_columns([problem], count),
            "naive": lambda weight=weight, inverse=inverse, count=count: naive(
                weight, inverse, count
            ),
        }
        rows.append({"n": size, "d": len(weight), "seconds": medians(functions, repeats)})
    small, large = (row["seconds"] for row in rows)
    return {
        "rows": rows,
        "exponents": {name: math.log2(large[name] / small[name]) for name in large},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=11008)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument(
        "--naive-n", type=int, default=2048, help="the larger size of the naive loop"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device, repeats = args.device, args.repeats
    rows = list(measure(args.n, args.d, torch.float32, device, repeats, True))
    rows += measure(args.n // 2, args.d // 2, torch.float64, device, repeats, False)
    loop = growth(args.naive_n, args.naive_n * args.d // args.n, device, repeats)
    command = " ".join(["python benchmarks/solver.py", *sys.argv[1:]])
    result = {**environment("solver"), "command": command, "repeats": args.repeats}
    write("solver", {**result, "rows": rows, "naive": loop})


if __name__ == "__main__":
    main()
