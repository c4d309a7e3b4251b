"""Speed of every attention kernel on this GPU, forward and backward, over a pack of sequences.

    python benchmarks/attention_kernels.py     a table of milliseconds and TFLOP/s (causal FLOPs)

The last lines measure one rank's share under context parallelism. Each pack has new lengths there,
because in RL no two packs have the same lengths.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_timing import timed  # noqa: E402
from vime.backends.megatron.kernels.attention import attend  # noqa: E402
from vime.backends.megatron.kernels.attention_trial import missing  # noqa: E402
from vime.backends.megatron.kernels.choice import ATTENTION  # noqa: E402
from vime.backends.megatron.kernels.spans import Spans  # noqa: E402

MIXED = [5000, 300, 2100, 700, 4096, 1500, 900, 1788]
SETTINGS = (
    ("2 x 8192, 32 heads on 8", 32, 8, [8192] * 2),
    ("16 x 1024, 16 heads on 8", 16, 8, [1024] * 16),
    ("mixed lengths, 32 heads on 8", 32, 8, MIXED),
)
WIDTH = 128
CP = 4
NEW_SEQUENCES = 12


def main() -> int:
    for title, heads, groups, lengths in SETTINGS:
        print(title)
        bounds = [0, *itertools.accumulate(lengths)]
        spans = Spans.of(bounds, "cuda")
        make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
        q = torch.randn(bounds[-1], heads, WIDTH, **make)
        k, v = (torch.randn(bounds[-1], groups, WIDTH, **make) for _ in range(2))
        flops = sum(2 * heads * WIDTH * n * n for n in lengths)  # causal; backward: twice
        for name in ATTENTION:
            if problem := missing(name):
                print(f"  {name:8}{problem}")
                continue
            try:
                measure(name, q, k, v, spans, flops)
            except Exception as error:  # noqa: BLE001 - go on with the other kernels
                print(f"  {name:8}{type(error).__name__}: {str(error)[:300]}")
    print(f"new packs of {NEW_SEQUENCES} sequences, 32 heads on 8, rank 0 of {CP}")
    for name in ATTENTION:
        if missing(name) is None:
            measure_new_packs(name)
    return 0


def measure_new_packs(name: str) -> None:
    """Forward and backward of one layer's keys, values and attention, over new packs each time."""
    from vime.backends.megatron.model.zigzag import seen_by

    draw, taken_ms, tokens = random.Random(0), [], []
    for _ in range(12):
        lengths = [2 * CP * draw.randint(340, 430) for _ in range(NEW_SEQUENCES)]
        bounds = [0, *itertools.accumulate(lengths)]
        make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
        q = torch.randn(bounds[-1] // CP, 32, WIDTH, **make)
        gathered = torch.randn(bounds[-1], 8, 2 * WIDTH, **make)
        torch.cuda.synchronize()
        began = time.perf_counter()
        rows, queries, keys = seen_by(bounds, CP, 0, "cuda")
        k, v = gathered.index_select(0, rows).split(WIDTH, dim=-1)
        attend(name, q, k, v, queries, keys, None).sum().backward()
        torch.cuda.synchronize()
        taken_ms.append(1e3 * (time.perf_counter() - began))
        tokens.append(bounds[-1])
    print(
        f"  {name:8}median {statistics.median(taken_ms[1:]):6.2f} ms, "
        f"worst {max(taken_ms[1:]):6.2f} ms, first call {taken_ms[0]:6.1f} ms; "
        f"{min(tokens):,} to {max(tokens):,} tokens",
        flush=True,
    )


def measure(name, q, k, v, spans, flops) -> None:
    began = time.perf_counter()
    out = attend(name, q, k, v, spans, spans, None)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.cuda.synchronize()
    first_s = time.perf_counter() - began

    def forward() -> None:
        with torch.no_grad():
            attend(name, q, k, v, spans, spans, None)

    out = attend(name, q, k, v, spans, spans, None)

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
