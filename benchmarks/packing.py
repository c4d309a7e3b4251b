"""How full micro-batches are, how evenly ranks share the work, and how long planning takes.

    python benchmarks/packing.py        writes benchmarks/results/packing.json

256 response lengths come from a long-tailed (log-normal) distribution with a median of about 2,000
tokens, cut at 8,192. With 200 tokens of prompt they are packed to 9,216 tokens, in 20 batches for
each number of data-parallel ranks.

Efficiency is the share of the micro-batches' room that tokens fill. Every rank has the same number
of micro-batches, so N ranks have a multiple of N together. `attainable` is the efficiency of the
smallest such multiple that holds all tokens; no plan can do better. Eight ranks have nine or ten
micro-batches each here, and in most batches the bound is below the target of 0.97. Imbalance is the
estimated work of the busiest rank over the mean, less 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, on_this_cpu, quartiles, save  # noqa: E402
from vime.data.bins import fewest_bins  # noqa: E402
from vime.data.packing import PackingRules, plan_step, sequence_cost  # noqa: E402
from vime.types import StepPlan  # noqa: E402

RESULT = RESULTS / "packing.json"
CAP = 9216
RANKS = (1, 2, 4, 8)
BATCHES, BATCH = 20, 256
MANY, MANY_RANKS = 100_000, 64
TARGETS = {"packing/efficiency": 0.97, "packing/imbalance": 0.03, "packing/plan_time": 2.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    figures = measure()
    for f in figures:
        low, high = f["spread"]
        line = f"{f['name']:<32} {f['value']:.4f} ({low:.4f} to {high:.4f}) {f['unit']}"
        if "attainable" in f:
            best, num = f["batches_at_the_bound"], f["num_batches"]
            line += f"; attainable {f['attainable']['value']:.4f}, reached in {best} of {num}"
        print(line)
    save(args.output, figures)
    print(f"written to {args.output}")
    return 0


def measure() -> list[dict[str, Any]]:
    """Figures for the result file: medians over batches, quartiles as spread."""
    common = {**on_this_cpu(("numpy",)), "num_batches": BATCHES}
    figures = []
    for dp in RANKS:
        rules = PackingRules(dp=dp, max_tokens=CAP, balance=True)
        full, uneven, bounds = [], [], []
        for seed in range(BATCHES):
            lengths = long_tailed(BATCH, seed)
            plan = plan_step(range(BATCH), lengths, rules)
            full.append(efficiency(plan, lengths))
            uneven.append(imbalance(plan, lengths))
            bounds.append(attainable(lengths, dp))
        for name, values in (("packing/efficiency", full), ("packing/imbalance", uneven)):
            worst = min(values) if name == "packing/efficiency" else max(values)
            figures.append(
                {"name": f"{name}_dp{dp}", "unit": "1", **quartiles(values), **common,
                 "worst": round(worst, 5), "target": TARGETS[name]}
            )  # fmt: skip
        best = sum(a == b for a, b in zip(full, bounds, strict=True))
        figures[-2] |= {"attainable": quartiles(bounds), "batches_at_the_bound": best}
    walls, cpus = planning_seconds()
    for name, seconds in (("packing/plan_time", walls), ("packing/plan_cpu_time", cpus)):
        figures.append(
            {"name": name, "unit": "s", **quartiles(seconds), **common, "num_samples": MANY,
             "num_ranks": MANY_RANKS, "target": TARGETS["packing/plan_time"]}
        )  # fmt: skip
    return figures


def long_tailed(num: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return (np.clip(rng.lognormal(7.6, 0.8, num), 64, 8192).astype(int) + 200).tolist()


def efficiency(plan: StepPlan, lengths: Sequence[int]) -> float:
    num = sum(len(owned) for owned in plan.micro_batches)
    return sum(lengths) / (num * CAP)


def attainable(lengths: Sequence[int], dp: int) -> float:
    """An upper bound of `efficiency`: there are a multiple of `dp` micro-batches of CAP tokens."""
    num = -(-fewest_bins(lengths, CAP) // dp) * dp
    return sum(lengths) / (num * CAP)


def imbalance(plan: StepPlan, lengths: Sequence[int]) -> float:
    work = [
        sum(sequence_cost(lengths[p]) for b in owned for p in b) for owned in plan.micro_batches
    ]
    return max(work) / statistics.fmean(work) - 1


def planning_seconds(repeats: int = 3) -> tuple[list[float], list[float]]:
    """(wall-clock seconds, CPU seconds) of planning one step of MANY samples, by repeat."""
    lengths = long_tailed(MANY, 0)
    rules = PackingRules(dp=MANY_RANKS, max_tokens=CAP, balance=True)
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        plan_step(range(MANY), lengths, rules)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return walls, cpus


if __name__ == "__main__":
    sys.exit(main())
