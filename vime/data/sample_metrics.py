"""Metrics of a rollout's samples and of their rewards. No other file writes these names."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence

from vime.data.rewards import zero_std_counts
from vime.types import Sample, Status


def is_usable(sample: Sample, needs_reward: bool) -> bool:
    """Whether a sample did not fail and has a reward, if the loss needs rewards."""
    return sample.status is not Status.FAILED and not (needs_reward and sample.reward is None)


def of_samples(samples: Sequence[Sample], needs_reward: bool) -> dict[str, float]:
    """Counts of samples; lengths and truncation of the usable ones."""
    usable = [s for s in samples if is_usable(s, needs_reward)]
    lengths = [s.response_length for s in usable]
    metrics: dict[str, float] = {
        "rollout/num_samples": len(samples),
        "rollout/failed_samples": len(samples) - len(usable),
        "rollout/removed_samples": sum(s.remove_sample for s in usable),
        "rollout/empty_samples": lengths.count(0),
    }
    if usable:
        metrics |= {
            "rollout/response_len/mean": statistics.fmean(lengths),
            "rollout/response_len/median": statistics.median(lengths),
            "rollout/response_len/max": max(lengths),
            "rollout/response_len/min": min(lengths),
            "rollout/truncated_ratio": statistics.fmean(
                s.status is Status.TRUNCATED for s in usable
            ),
        }
    return {name: float(value) for name, value in metrics.items()}


def of_rewards(raw: Sequence[float], scores: Sequence[float]) -> dict[str, float]:
    """Means of the rewards before and after the estimator's baseline."""
    return {
        "rollout/raw_reward": statistics.fmean(raw),
        "rollout/rewards": statistics.fmean(scores),
    }


def of_groups(raw: Sequence[float], group_ids: Sequence[Hashable]) -> dict[str, float]:
    """Numbers of groups in which every sample has the same reward: total, and by that reward."""
    counts = zero_std_counts(raw, group_ids)
    metrics = {"rollout/zero_std/count": float(sum(counts.values()))}
    return metrics | {f"rollout/zero_std/count_{r:g}": float(n) for r, n in sorted(counts.items())}
