"""Rate and CPU time of grading 10,000 answers, compared with one process that calls math-verify.

    make bench-grading

The answers resemble those of a mathematics rollout: mostly plain numbers, some fractions, roots and
formulas in several spellings. A third of them are wrong, and some have no box. vime grades numbers
at once, and the rest in `--rm-num-workers` processes with a deadline for each answer. The peer
parses and verifies one answer after the other, without a pool and without deadlines.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.configs import config_of  # noqa: E402
from benchmarks.records import RESULTS, extremes, on_this_cpu, save  # noqa: E402
from vime.config.view import ArgsView  # noqa: E402
from vime.rollout import grading  # noqa: E402
from vime.rollout.rm_hub import math, pool  # noqa: E402
from vime.types import Sample, Status  # noqa: E402

RESULT = RESULTS / "grading.json"
NUM_ANSWERS = 10_000
GROUP = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-answers", type=int, default=NUM_ANSWERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    answers = make_answers(args.num_answers)
    runs: dict[str, list[dict[str, float]]] = {"vime": [], "one process": []}
    wrong = 0
    for _ in range(args.repeats):  # in turn, so a busy machine slows both
        runs["vime"].append(timed(lambda: grade_with_vime(answers, args.workers)))
        runs["one process"].append(timed(lambda: grade_in_one_process(answers)))
        wrong = disagreements(answers, args.workers)
    figures = summarize(runs, args.num_answers, args.workers, wrong)
    for figure in figures:
        print(f"{figure['name']:32} {figure['value']:>12} {figure['unit']}")
    save(args.output, figures)
    print(f"written to {args.output}")
    return 0


def make_answers(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(response, label) pairs."""
    rng = random.Random(seed)
    return [_one(rng) for _ in range(count)]


def _one(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 99), rng.randint(2, 9)
    kind = rng.choices(("number", "fraction", "root", "formula", "none"), (70, 10, 8, 7, 5))[0]
    spellings = {
        "number": (str(a * b), rng.choice((str(a * b), f"{a * b}.0", f"{a * b:,}"))),
        "fraction": (rf"\frac{{{a}}}{{{b}}}", rng.choice((f"{a}/{b}", rf"\dfrac{{{a}}}{{{b}}}"))),
        "root": (rf"{b}\sqrt{{2}}", rf"\sqrt{{{2 * b * b}}}"),
        "formula": (f"{a}x^2+{b}x", f"x({a}x+{b})"),
        "none": (str(a), ""),
    }
    label, given = spellings[kind]
    if rng.random() < 1 / 3:
        given = str(a * b + rng.randint(1, 9))
    answer = rf"so it is \boxed{{{given}}}." if kind != "none" else "I do not know."
    return f"We have {a} and {b}. " + "Therefore, as above, " * rng.randint(5, 60) + answer, label


def grade_with_vime(answers: list[tuple[str, str]], workers: int) -> list[float]:
    """Rewards, graded as in a rollout: all groups in parallel. Includes starting the processes."""
    cfg = config_of(
        model={"hf_checkpoint": "none"},
        batch={"prompts": 1},
        reward={"rm_type": "math", "workers": workers},
    )
    args = ArgsView(cfg)
    samples = [
        Sample(index=i, response=response, label=label, status=Status.COMPLETED)
        for i, (response, label) in enumerate(answers)
    ]

    async def grade_all() -> None:
        groups = [samples[i : i + GROUP] for i in range(0, len(samples), GROUP)]
        await asyncio.gather(*(grading.grade_group(args, group) for group in groups))

    try:
        asyncio.run(grade_all())
    finally:  # end the processes here, so their CPU time counts
        settings = cfg.reward
        pool.shared_pool(settings.workers, settings.timeout_s).close()
        pool.shared_pool.cache_clear()
    failed = [s.failure for s in samples if s.reward is None]
    assert not failed, f"{len(failed)} answers were not graded: {failed[0]}"
    return [s.reward for s in samples]


def grade_in_one_process(answers: list[tuple[str, str]]) -> list[float]:
    from math_verify import parse, verify

    rewards = []
    for response, label in answers:
        truth = parse(f"${label}$", parsing_timeout=None)
        rewards.append(
            float(verify(truth, parse(response, parsing_timeout=None), timeout_seconds=None))
        )
    return rewards


def disagreements(answers: list[tuple[str, str]], workers: int, count: int = 500) -> int:
    """How many of the first `count` answers the pool grades differently from the grader alone."""
    few = answers[:count]
    alone = [math.grade(response, label, {}) for response, label in few]
    return sum(a != b for a, b in zip(grade_with_vime(few, workers), alone, strict=True))


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """{"seconds", "cpu_s"}; the CPU time includes children that have ended."""
    before, started = os.times(), time.perf_counter()
    work()
    after, seconds = os.times(), time.perf_counter() - started
    return {"seconds": seconds, "cpu_s": sum(after[:4]) - sum(before[:4])}


def summarize(
    runs: dict[str, list[dict[str, float]]], count: int, workers: int, wrong: int
) -> list[dict[str, Any]]:
    common = {
        **on_this_cpu(("math-verify", "sympy")),
        "num_answers": count,
        "num_workers": workers,
    }
    rates = {name: [count / run["seconds"] for run in of] for name, of in runs.items()}
    cpu = {name: [run["cpu_s"] / count * 1e6 for run in of] for name, of in runs.items()}
    peer = {name: statistics.median(values["one process"]) for name, values in
            (("rate", rates), ("cpu", cpu))}  # fmt: skip
    return [
        {"name": "grading/rate", "unit": "answers/s", **extremes(rates["vime"], 2),
         "peer": round(peer["rate"], 1), **common},
        {"name": "grading/cpu_per_answer", "unit": "us", **extremes(cpu["vime"], 2),
         "peer": round(peer["cpu"], 1), **common},
        {"name": "grading/speedup", "unit": "1",
         **extremes([a / b for a, b in zip(rates["vime"], rates["one process"], strict=True)], 2),
         "peer": 1.0, **common},
        {"name": "grading/disagreements", "unit": "answers", "value": wrong, "spread": [wrong] * 2,
         "peer": 0, **common},
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
