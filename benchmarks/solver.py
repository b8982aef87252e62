"""How long greedy column selection takes, against inverting the same Hessian: ratios in one run, medians of five."""

import json
import platform
import statistics
import time
from pathlib import Path

import torch

from prunekit.compensation.solver import choose_columns, invert

HERE = Path(__file__).parent
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
    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    result = {"command": "python benchmarks/solver.py", "repeats": REPEATS, **machine, "rows": rows}
    (HERE / "solver.json").write_text(json.dumps(result, indent=1) + "\n")
    where = f"{machine['machine']}, torch {machine['torch']}, {machine['threads']} threads"
    lines = [
        "# Greedy column selection against the inverse it works on",
        "",
        f"`{result['command']}`, {where}, float64, medians of {REPEATS}. Generated from `solver.json`.",
        "",
        "| n | columns removed | invert, s | choose, s | choose / invert |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['n']} | {row['share']:.0%} | {row['invert_seconds']:.4f} | {row['choose_seconds']:.4f} "
            f"| {row['ratio']:.2f} |"
        )
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
