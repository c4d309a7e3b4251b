"""Reports on a rollout's steps: seconds, means, and the samples of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from vime.observe.spans import span
from vime.plan.shape import Shape
from vime.types import RankBatch, StepPlan


def where_in(batch: RankBatch, step_id: int) -> str:
    return f"rollout {batch.rollout_id}, step {step_id}"


def samples_of(batch: RankBatch, plan: StepPlan, spoilt: Sequence[int] = ()) -> str:
    """The indices of a step's samples, or only of the samples at the `spoilt` positions.

    spoilt  positions of sequences with a token whose loss or gradient is not finite
    """
    members = spoilt or sorted(p for owned in plan.micro_batches for b in owned for p in b)
    shown = ", ".join(str(index) for index in batch.indices[list(members[:16])])
    more = ", ..." if len(members) > 16 else ""
    return f"samples {shown}{more}" + ": loss or gradient not finite" * bool(spoilt)


def mean_of_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the steps that have it, and the number of skipped steps.

    steps  one dict per step, empty where the step was skipped
    The divergences are also given for the first step alone, before any weight has moved.
    """
    names = dict.fromkeys(name for step in steps for name in step)
    metrics = {}
    for name in names:
        values = [step[name] for step in steps if name in step]
        metrics[name] = sum(values) / len(values)
    first = ("train/ppo_kl", "train/kl_loss")
    metrics |= {f"{name}_first_step": steps[0][name] for name in first if name in steps[0]}
    metrics["train/skipped_steps"] = float(sum(not step for step in steps))
    return metrics


def training_speed(shape: Shape | None, batch: RankBatch, seconds: float) -> dict[str, float]:
    """Tokens per second of all ranks, and TFLOP/s of one GPU, computed from the model's shape.

    seconds  of the actor's optimizer steps
    """
    lengths = batch.lengths.tolist()
    metrics = {"perf/actor_train_tok_per_s": sum(lengths) / seconds}
    if shape is not None:
        rate = shape.training_flops(lengths) / seconds / dist.get_world_size()
        metrics["perf/actor_train_tflops"] = rate / 1e12
    return metrics


class Clock:
    """Seconds by name. Each measurement waits for the device to finish."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with span(name.removeprefix("perf/").removesuffix("_time").replace("_", " ")):
            yield
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - started
