"""What a trainer says of a rollout's steps: seconds, means, and which samples a step had."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vime.types import StepPlan, TrainBatch


def samples_of(batch: TrainBatch, plan: StepPlan) -> str:
    """Which samples a step has; first those whose score or tokens' weights are not finite."""
    members = sorted(p for owned in plan.micro_batches for b in owned for p in b)
    found = [batch.sequences[p] for p in members]
    bad = [s for s in found if not (math.isfinite(s.reward) and math.isfinite(s.weight.sum()))]
    shown = ", ".join(str(s.index) for s in (bad or found)[:16])
    more = ", ..." if len(bad or found) > 16 else ""
    return f"samples {shown}{more}" + " have scores that are not finite" * bool(bad)


def mean_of_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the steps that have it; the count of skipped ones.

    What can only differ from 0 once weights have moved is also given for the first step alone.
    """
    names = dict.fromkeys(name for step in steps for name in step)
    metrics = {}
    for name in names:
        values = [step[name] for step in steps if name in step]
        metrics[name] = sum(values) / len(values)
    first = ("train/ppo_kl", "train/kl_loss")
    metrics |= {f"{name}_first_step": steps[0][name] for name in first if name in steps[0]}
    metrics["train/skipped_steps"] = sum(step["train/skipped_steps"] for step in steps)
    return metrics


class Clock:
    """Seconds by name, after the device has finished."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - started
