"""How long greedy column selection takes, against inverting the same Hessian: ratios in one run, medians of five."""

import statistics
import time

import torch
from page import environment, write

from prunekit.compensation.solver import choose_columns, invert

SIZES, SHARES, REPEATS = (512, 1024, 2048), (0.2, 0.5), 5


def timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(n: int, share: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(4 * n, n, generator=generator)
    hessian = x.T @ x / len(x)
    weight = torch.randn(n // 3, n, generator=generator, dtype=torch.float64)
    inverse = invert(hessian).matrix
    inversions, choices = [], []
    for _ in range(REPEATS + 1):
        inversions.append(timed(lambda: invert(hessian)))
        choices.append(timed(lambda: choose_columns(weight, inverse, int(share * n))))
    ratios = [choice / inversion for choice, inversion in zip(choices[1:], inversions[1:], strict=True)]
    return {
        "n": n,
        "share": share,
        "invert_seconds": statistics.median(inversions[1:]),
        "choose_seconds": statistics.median(choices[1:]),
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    rows = [measure(n, share) for n in SIZES for share in SHARES]
    write("solver", {**environment("solver"), "repeats": REPEATS, "rows": rows})


if __name__ == "__main__":
    main()
