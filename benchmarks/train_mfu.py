"""Training speed of a GPU: model FLOPs as a share of the rate of the GPU's own matrix product.

    make bench-train-mfu      a table; writes benchmarks/results/train_mfu_4b.json and _0_6b.json
    PROFILE=1 make bench-train-mfu      also the 15 slowest kernels of each case
    python benchmarks/train_mfu.py --only 4b-tp2 4b-tp2-plain      on two GPUs

The models have random weights in bfloat16, and gradients are summed in float32 where they fit. "4b"
has the shapes of Qwen3-4B and packs of 16,384 tokens in sequences of 8,192, forward and backward.
"0.6b" has the shapes of Qwen3-0.6B and sequences of 1,024, with the optimizer's step. "4b-tp2" is
the share of scripts/run-qwen3-4B.sh on two GPUs: tensor and sequence parallelism, full
recomputation, packs of up to 9,216 tokens, here of log-normal lengths. "-plain" runs Megatron's own
modules.

The model FLOPs of a token are 6 N + 6 L H D S. N counts every parameter once, because the output
layer is the embedding's transpose. The second term is causal attention: 2 products of H x D
channels with S / 2 positions on average, 3 times (forward, and two gradients). Recomputation does
not count.

The peer is a bfloat16 product of 8192 x 8192 x 8192 in the same process. Each case runs in its own
processes. Times are CUDA events, the median of several steps. "launch ms" is the time of a step of
sequences that are a sixteenth as long, which is about the host's own time. If it is close to the
step's time, the host limits the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, save, versions  # noqa: E402
from benchmarks.train_mfu_case import RESULT, cases  # noqa: E402

CASE_PROGRAM = ROOT / "benchmarks/train_mfu_case.py"
CHILD_LIMIT_S = 150
TARGETS = {"4b": {"NVIDIA H200": 0.60, "NVIDIA H100": 0.50}, "0.6b": {"": 0.35}}


def main() -> int:
    named = " ".join(cases())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=cases(), metavar="CASE", help=f"of: {named}")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("train_mfu needs a CUDA GPU; this machine has none", file=sys.stderr)
        return 2
    alone = [name for name, case in cases().items() if case.tp == 1]
    found = {name: child(name) for name in args.only or alone}
    for name, case in cases().items():
        if not case.plain and "mfu" in found.get(name, {}):
            write(name, found[name], found.get(f"{name}-plain"))
    show(found)
    return 0 if all("mfu" in f for f in found.values()) else 1


def child(name: str) -> dict[str, Any]:
    """Runs the case in its own processes: its figures, or {"error": ...}."""
    case = cases()[name]
    plain = {"VIME_KERNELS": "plain"} if case.plain else {}
    ranks = f"-m torch.distributed.run --standalone --nproc-per-node={case.tp}".split()
    command = [sys.executable, *(ranks if case.tp > 1 else ()), str(CASE_PROGRAM), name]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=os.environ | plain,
            stdout=subprocess.PIPE,
            text=True,
            timeout=CHILD_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {CHILD_LIMIT_S} s"}
    lines = done.stdout.splitlines()
    print("\n".join(x for x in lines if not x.startswith(RESULT)), flush=True)
    print(f"[{name}] {time.monotonic() - began:.0f} s", flush=True)
    results = [x.removeprefix(RESULT) for x in lines if x.startswith(RESULT)]
    if done.returncode or not results:
        return {"error": f"exit status {done.returncode}"}
    return json.loads(results[-1])


def target(name: str, device: str) -> float | None:
    return next((t for kind, t in TARGETS.get(name, {}).items() if kind in device), None)


def write(name: str, figures: dict[str, Any], plain: dict[str, Any] | None) -> None:
    kept = re.sub(r"\W", "_", name)
    record = {
        "name": f"train_mfu_{kept}",
        "value": round(figures["mfu"], 4),
        "unit": "model FLOPs / matrix product FLOPs",
        "peer": {
            "name": "8192^3 bf16 product, TFLOP/s",
            "value": round(figures["matrix_tflops"], 1),
        },
        "device": f"{figures['gpus']} x {figures['device']}",
        "versions": versions(("torch", "triton", "megatron-core")),
        "spread": [round(x, 4) for x in figures["spread"]],
        "target": target(name, figures["device"]),
        "ms": round(figures["ms"], 1),
        "tok_per_s": round(figures["tok_per_s"]),
        "peak_gib": round(figures["peak_gib"], 1),
        "launch_ms": round(figures["launch_ms"], 1),
        "kernels": figures["kernels"],
        "recompute": figures["recompute"],
        "plain": plain and {k: plain.get(k) for k in ("mfu", "ms", "peak_gib", "recompute")},
    }
    save(RESULTS / f"{record['name']}.json", record)


def show(found: dict[str, dict[str, Any]]) -> None:
    head = (
        "case",
        "of the matrix rate",
        "target",
        "ms",
        "tok/s a GPU",
        "launch ms",
        "peak GiB",
        "recompute",
    )
    rows: list[Sequence[str]] = [head]
    for name, f in found.items():
        if "error" in f:
            rows.append((name, f["error"], *[""] * 6))
            continue
        low, high = f["spread"]
        wanted = target(name, f["device"])
        rows.append(
            (
                name,
                f"{f['mfu']:.1%} ({low:.1%} to {high:.1%})",
                f"{wanted:.0%}" if wanted else "",
                f"{f['ms']:.0f}",
                f"{f['tok_per_s']:,.0f}",
                f"{f['launch_ms']:.0f}",
                f"{f['peak_gib']:.1f}",
                f["recompute"],
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    ran = next((f for f in found.values() if "mfu" in f), None)
    if ran:
        print(f"\n{ran['device']}: {ran['matrix_tflops']:.0f} TFLOP/s; {ran['kernels']}")


if __name__ == "__main__":
    sys.exit(main())
