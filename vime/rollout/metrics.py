"""What a rollout and an evaluation report, by the names of the metrics table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np

from vime.rollout.grading import TIMEOUT
from vime.rollout.sampling import Sampled
from vime.rollout.wire import UNKNOWN_VERSION
from vime.types import Group, Sample, Status


def of_rollout(args: Any, sampled: Sampled, seconds: float) -> dict[str, float]:
    """Lengths, truncation, failures and drops of one rollout."""
    samples = [sample for group in sampled.kept for sample in group]
    values = {**lengths(samples), **failures(samples)}
    for reason, count in sampled.drops.items():
        values[f"rollout/dynamic_filter/drop_{reason}"] = count
    aborted = [s for group in sampled.unfinished for s in group]
    values |= {
        "rollout/groups_taken": sampled.num_taken,
        "rollout/groups_surplus": len(sampled.surplus),
        "rollout/groups_aborted": len(sampled.unfinished),
        "rollout/aborted_tokens": sum(s.response_length for s in aborted),
    }
    versions = Counter(v for s in samples for v in set(s.weight_versions))
    known = [v for v in versions if v != UNKNOWN_VERSION]
    if known:
        values["rollout/weight_version/min"] = min(known)
        values["rollout/weight_version/max"] = max(known)
    if versions[UNKNOWN_VERSION]:
        values["rollout/weight_version/unknown"] = versions[UNKNOWN_VERSION]
    if others := [s.non_generation_time for s in samples if s.non_generation_time]:
        values["perf/non_generation_time/mean"] = sum(others) / len(samples)
        values["perf/non_generation_time/max"] = max(others)
    longest = max((s.response_length for s in samples), default=0)
    values["perf/longest_sample_tokens_per_sec"] = longest / max(seconds, 1e-9)
    return values


def lengths(samples: Sequence[Sample], prefix: str = "rollout") -> dict[str, float]:
    if not samples:
        return {}
    values = np.array([s.response_length for s in samples])
    return {
        f"{prefix}/response_len/mean": float(values.mean()),
        f"{prefix}/response_len/median": float(np.median(values)),
        f"{prefix}/response_len/max": int(values.max()),
        f"{prefix}/response_len/min": int(values.min()),
        f"{prefix}/truncated_ratio": _ratio(s.status is Status.TRUNCATED for s in samples),
    }


def failures(samples: Sequence[Sample], prefix: str = "rollout") -> dict[str, float]:
    """How many samples failed, and of these how many because a grader took too long."""
    failed = [s for s in samples if s.status is Status.FAILED]
    return {
        f"{prefix}/failed_samples": len(failed),
        f"{prefix}/grading_timeouts": sum((s.failure or "").startswith(TIMEOUT) for s in failed),
    }


def of_evaluation(name: str, groups: Sequence[Group], rewards: Sequence[Sequence[float]]) -> dict:
    """eval/{name}: mean reward with its 95% half-width, truncation, pass@k.

    groups   all samples, failed ones included
    rewards  of the graded samples, by group; a group without any counts for nothing
    """
    samples = [s for group in groups for s in group]
    values: dict[str, float] = {
        f"eval/{name}-truncated_ratio": _ratio(s.status is Status.TRUNCATED for s in samples),
        f"eval/{name}-response_len": float(np.mean([s.response_length for s in samples])),
    }
    if failed := sum(s.status is Status.FAILED for s in samples):
        values[f"eval/{name}-failed"] = failed
    graded = [np.array(group, dtype=float) for group in rewards if len(group)]
    if not graded:
        return values
    means = np.array([group.mean() for group in graded])
    values[f"eval/{name}"] = float(np.concatenate(graded).mean())
    if len(means) > 1:  # prompts are what was sampled, so their means are what varies
        values[f"eval/{name}-ci95"] = float(1.96 * means.std(ddof=1) / np.sqrt(len(means)))
    smallest = min(len(group) for group in graded)
    k = 1
    while k <= smallest:
        chances = [pass_at_k(len(group), int((group >= 1).sum()), k) for group in graded]
        values[f"eval/{name}-pass@{k}"] = float(np.mean(chances))
        k *= 2
    return values


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k answers drawn from n is right (arXiv:2107.03374, eq. 1)."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def _ratio(flags: Any) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0
