"""Attention of a pack on this GPU, forward and backward, by every kernel that is there.

python benchmarks/attention_kernels.py     a table of milliseconds and TFLOP/s (causal FLOPs)
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_mfu import timed  # noqa: E402
from vime.backends.megatron.kernels.attention import attend, missing  # noqa: E402
from vime.backends.megatron.kernels.choice import ATTENTION  # noqa: E402

MIXED = [5000, 300, 2100, 700, 4096, 1500, 900, 1788]
SETTINGS = (
    ("2 x 8192, 32 heads on 8", 32, 8, [8192] * 2),
    ("16 x 1024, 16 heads on 8", 16, 8, [1024] * 16),
    ("mixed lengths, 32 heads on 8", 32, 8, MIXED),
)
WIDTH = 128


def main() -> int:
    for title, heads, groups, lengths in SETTINGS:
        print(title)
        bounds = [0, *itertools.accumulate(lengths)]
        starts = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
        q = torch.randn(bounds[-1], heads, WIDTH, **make)
        k, v = (torch.randn(bounds[-1], groups, WIDTH, **make) for _ in range(2))
        flops = sum(2 * heads * WIDTH * n * n for n in lengths)  # causal; twice that backward
        for name in ATTENTION:
            if problem := missing(name):
                print(f"  {name:8}{problem}")
                continue
            try:
                measure(name, q, k, v, starts, bounds, flops)
            except Exception as error:  # noqa: BLE001 - the other kernels are still of interest
                print(f"  {name:8}{type(error).__name__}: {str(error)[:300]}")
    return 0


def measure(name, q, k, v, starts, bounds, flops) -> None:
    began = time.perf_counter()
    out = attend(name, q, k, v, starts, bounds, None)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.cuda.synchronize()
    first_s = time.perf_counter() - began

    def forward() -> None:
        with torch.no_grad():
            attend(name, q, k, v, starts, bounds, None)

    out = attend(name, q, k, v, starts, bounds, None)

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    ms = [statistics.median(timed(f, 10, 2)) for f in (forward, backward)]
    rates = flops / ms[0] / 1e9, 2 * flops / ms[1] / 1e9
    print(
        f"  {name:8}forward {ms[0]:6.2f} ms {rates[0]:4.0f} TFLOP/s   "
        f"backward {ms[1]:6.2f} ms {rates[1]:4.0f} TFLOP/s   first call {first_s:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
