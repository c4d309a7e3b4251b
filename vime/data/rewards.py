"""Turns raw rewards into one score per sample. A group is the samples with one group id."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from vime.config.sections.algorithm import AlgorithmConfig


def score_samples(
    rewards: Sequence[float], group_ids: Sequence[Hashable], cfg: AlgorithmConfig
) -> list[float]:
    """One score per sample, in the given order.

    The estimator's baseline uses the samples of one group. Removed samples belong to the group.
    Failed samples do not, so leave them out. With a group baseline, the score is 0 in a group of
    one sample and in a group with equal rewards.

    rewards    one number per sample. Raises ValueError if one is not finite, or if one is negative
               and the estimator needs rewards of at least 0
    group_ids  samples with the same id form a group, at any position
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
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), to subtract from the reward.

    It is 0 for up to longest - buffer tokens, then grows linearly to `factor` at `longest`.
    """
    return factor * min(max(length - (longest - buffer), 0) / buffer, 1.0)


def zero_std_counts(rewards: Sequence[float], group_ids: Sequence[Hashable]) -> dict[float, int]:
    """{reward: number of groups in which every sample has it}, without groups of one."""
    members: dict[Hashable, list[float]] = defaultdict(list)
    for reward, group_id in zip(rewards, group_ids, strict=True):
        members[group_id].append(reward)
    counts: dict[float, int] = defaultdict(int)
    for values in members.values():
        if len(values) > 1 and min(values) == max(values):
            counts[values[0]] += 1
    return dict(counts)
