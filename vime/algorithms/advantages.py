"""Advantage estimators: what a group's rewards say about each token.

An estimator is a `baseline` over the rewards of one group and a `spread` of a sequence's score over
its tokens. A new one is a function and a line in `ESTIMATORS`, whose keys are the choices of
`--advantage-estimator`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vime.algorithms.policy import PolicyLoss, cispo_loss, clipped_policy_loss

Baseline = Callable[[Tensor], Tensor]  # rewards_G [G] -> scores [G]
Spread = Callable[[float, Tensor, float], Tensor]  # score, penalty_T [T], gamma -> advantages [T]

STD_EPS = 1e-6


def grpo_baseline(rewards_G: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6), unbiased std, in one group (GRPO, arXiv:2402.03300).

    A group of one has no spread: it is only centred, so its score is 0. So are all-equal rewards.
    """
    centred_G = centred_baseline(rewards_G)
    if len(rewards_G) < 2:
        return centred_G
    return centred_G / (rewards_G.std() + STD_EPS)


def centred_baseline(rewards_G: Tensor) -> Tensor:
    """r - mean of the group; exactly 0 where all are equal, which a rounded mean may miss."""
    if bool((rewards_G == rewards_G[0]).all()):
        return torch.zeros_like(rewards_G)
    return rewards_G - rewards_G.mean()


def leave_one_out_baseline(rewards_G: Tensor) -> Tensor:
    """r minus the mean of the others (RLOO, arXiv:2402.14740). A group of one scores 0."""
    size = len(rewards_G)
    return centred_baseline(rewards_G) * (size / (size - 1) if size > 1 else 0.0)


def mean_scaled_baseline(rewards_G: Tensor) -> Tensor:
    """(r - mean) / mean in one group (MaxRL, arXiv:2602.02710): the gradient of the log of the pass
    rate. With 0 for a failure and 1 for a success, the rarer a success the more it counts. A group
    that earns nothing scores 0.

    Raises ValueError for a reward below 0: the mean would say nothing.
    """
    if bool((rewards_G < 0).any()):
        raise ValueError(
            f"reward {rewards_G.min():g} is below 0, and --advantage-estimator maxrl divides by a "
            "group's mean. Give rewards from 0 up, or choose another estimator"
        )
    mean = rewards_G.mean()
    return centred_baseline(rewards_G) / mean if mean > 0 else torch.zeros_like(rewards_G)


def no_baseline(rewards_G: Tensor) -> Tensor:
    """The reward itself."""
    return rewards_G


def same_for_every_token(score: float, penalty_T: Tensor, gamma: float) -> Tensor:
    """The sequence's score at each token, less that token's own penalty. `gamma` plays no part."""
    return score - penalty_T


def discounted_returns(score: float, penalty_T: Tensor, gamma: float) -> Tensor:
    """Return-to-go: the score comes with the last token, each token costs its penalty.

    return_t = gamma**(T-1-t) * score - sum over s >= t of gamma**(s-t) * penalty_s
    """
    step_T = -penalty_T.clone()
    step_T[-1] += score
    if gamma == 1.0:
        return step_T.flip(0).cumsum(0).flip(0)
    returns, running = [], 0.0
    for value in reversed(step_T.tolist()):
        running = value + gamma * running
        returns.append(running)
    return step_T.new_tensor(returns[::-1])


@dataclass(frozen=True, slots=True)
class Estimator:
    """How one family of methods judges a token.

    baseline      scores a group's rewards
    raw_baseline  the same, not divided by the std (--disable-grpo-std-normalization)
    spread        a sequence's score over its tokens
    whiten        always whiten over the step, as under --normalize-advantages
    policy_loss   of one token
    sequence_ratio  every token has its sequence's ratio (`policy.sequence_ratio`)
    critic        a value model judges each token (`critic.generalized_advantages`); no `spread`
    """

    baseline: Baseline
    raw_baseline: Baseline
    spread: Spread = same_for_every_token
    whiten: bool = False
    policy_loss: PolicyLoss = clipped_policy_loss
    sequence_ratio: bool = False
    critic: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(grpo_baseline, centred_baseline),
    "gspo": Estimator(grpo_baseline, centred_baseline, sequence_ratio=True),
    "cispo": Estimator(grpo_baseline, centred_baseline, policy_loss=cispo_loss),
    # Dr. GRPO (arXiv:2503.20783); its weights, the same for every token, are the batch's business
    "dr_grpo": Estimator(centred_baseline, centred_baseline),
    "rloo": Estimator(leave_one_out_baseline, leave_one_out_baseline),
    "maxrl": Estimator(mean_scaled_baseline, mean_scaled_baseline),
    # REINFORCE++ (arXiv:2501.03262), without and with a group baseline
    "reinforce_plus_plus": Estimator(no_baseline, no_baseline, discounted_returns, whiten=True),
    "reinforce_plus_plus_baseline": Estimator(centred_baseline, centred_baseline, whiten=True),
    "ppo": Estimator(no_baseline, no_baseline, critic=True),  # PPO (arXiv:1707.06347)
}


def whiten(values_T: Tensor, mask_T: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """(x - mean) / (std + 1e-8), unbiased, over the tokens with mask 1; [T], 0 elsewhere.

    sum_over_ranks adds a [3] float64 tensor over the ranks that share the step's tokens.
    """
    kept_T = values_T.double() * mask_T
    total = torch.stack([mask_T.double().sum(), kept_T.sum(), (kept_T * values_T).sum()])
    count, first, second = sum_over_ranks(total).unbind()
    mean = first / count.clamp(min=1)
    variance = (second - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    white_T = (values_T - mean) / (variance.sqrt() + 1e-8)
    return (white_T * mask_T).to(values_T.dtype)
