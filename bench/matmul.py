"""Products of float32 matrices by the library that torch calls and by oneDNN, as --matmul chooses: 10⁹ operations a second.

Equal results are asserted first. Then the two take turns on each product; printed are the medians.

    OMP_NUM_THREADS=1 python bench/matmul.py
"""

from __future__ import annotations

import argparse
import statistics
import time

SHAPES = {
    "square": (2048, 2048, 2048), "a layer": (896, 128, 512), "a larger layer": (1020, 256, 1024),
    "a vocabulary head, in a chunk of tokens": (192, 128, 50_304),
}  # fmt: skip


def products(size: tuple[int, int, int]):
    """x Wᵀ, and the gradients of x and W: functions without arguments, and multiplications of each."""
    import torch

    m, k, n = size
    x, w, g = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    y, dx, dw = torch.zeros(m, n), torch.zeros(m, k), torch.zeros(n, k)
    return [
        lambda: torch.mm(x, w.t(), out=y), lambda: torch.mm(g, w, out=dx), lambda: torch.mm(g.t(), x, out=dw),
    ], m * k * n  # fmt: skip


def attention():
    import torch

    q, scores = torch.randn(16, 255, 64), torch.randn(16, 255, 255)
    return [lambda: q @ q.mT, lambda: scores @ q, lambda: scores.mT @ q], 16 * 255 * 64 * 255


def main() -> None:
    import torch

    from retrograd.core import matmul

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=30)
    arguments = parser.parse_args()
    if reason := matmul.no_onednn():
        raise SystemExit(f"nothing to compare: {reason}")
    print(f"threads: {torch.get_num_threads()}\n\n| product | torch's | oneDNN |\n|---|---|---|")
    for name, (calls, count) in {**{n: products(s) for n, s in SHAPES.items()}, "attention": attention()}.items():
        rates: dict[str, list[str]] = {"torch": [], "onednn": []}
        for call in calls:
            seconds: dict[str, list[float]] = {"torch": [], "onednn": []}
            results = {}
            for turn in range(arguments.turns + 1):
                for library, taken in seconds.items():
                    with matmul.preferring(library):
                        start = time.perf_counter()
                        result = call()
                        taken.append(time.perf_counter() - start)
                    results[library] = result.clone() if turn == 0 else results[library]
            apart = float((results["torch"] - results["onednn"]).norm() / results["torch"].norm())
            assert apart < 1e-5, f"{name}: the two differ by {apart:.2g}"
            for library, taken in seconds.items():
                rates[library].append(f"{2 * count / statistics.median(taken[1:]) / 1e9:.0f}")
        print(f"| {name} | {' | '.join(', '.join(cells) for cells in rates.values())} |", flush=True)


if __name__ == "__main__":
    main()
