"""From raw rewards to one score per sample. Groups are keyed by id, never found by reshaping."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from vime.config import AlgorithmConfig


def score_samples(
    rewards: Sequence[float], group_ids: Sequence[Hashable], cfg: AlgorithmConfig
) -> list[float]:
    """One score per sample, in the order given.

    The estimator's baseline runs over the members of each group: a removed sample belongs to its
    group's statistics, a failed one does not and must not be passed. A group of one, and a group
    whose rewards are all equal, scores 0 wherever the estimator has a group baseline.

    rewards     one number per sample. Raises ValueError on one that is not finite, or below 0
                where the estimator needs rewards from 0 up
    group_ids   samples with the same id form a group, wherever they stand
    """
    if bad := [i for i, r in enumerate(rewards) if not math.isfinite(r)]:
        raise ValueError(f"reward {rewards[bad[0]]} of sample {bad[0]} is not a finite number")
    estimator = cfg.estimator
    baseline = estimator.baseline
    if not cfg.grpo_std and estimator.without_std is not None:
        baseline = estimator.without_std
    if baseline is None or not cfg.normalize_rewards:
        return [float(r) for r in rewards]
    if estimator.nonnegative_rewards and min(rewards) < 0:
        raise ValueError(
            f"reward {min(rewards):g} is below 0, where --advantage-estimator "
            f"{cfg.advantage_estimator} has no meaning. Give rewards from 0 up, or choose another "
            "estimator"
        )
    members: dict[Hashable, list[int]] = defaultdict(list)
    for position, group_id in enumerate(group_ids):
        members[group_id].append(position)
    scores = [0.0] * len(rewards)
    for positions in members.values():
        values_G = torch.tensor([rewards[p] for p in positions], dtype=torch.float32)
        for position, score in zip(positions, baseline(values_G).tolist(), strict=True):
            scores[position] = score
    return scores


def overlong_penalty(length: int, longest: int, buffer: int, factor: float) -> float:
    """What a response of `length` tokens loses: DAPO's soft punishment (arXiv:2503.14476, eq. 13).

    0 up to longest - buffer, then linear, `factor` at `longest` and above.
    """
    return factor * min(max(length - (longest - buffer), 0) / buffer, 1.0)


def zero_std_counts(rewards: Sequence[float], group_ids: Sequence[Hashable]) -> dict[float, int]:
    """{reward: number of groups of two or more in which every sample has it}."""
    members: dict[Hashable, list[float]] = defaultdict(list)
    for reward, group_id in zip(rewards, group_ids, strict=True):
        members[group_id].append(reward)
    counts: dict[float, int] = defaultdict(int)
    for values in members.values():
        if len(values) > 1 and min(values) == max(values):
            counts[values[0]] += 1
    return dict(counts)
