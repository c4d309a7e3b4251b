"""The maths of a critic: advantages from its values, and the loss that trains it."""

from __future__ import annotations

import torch
from torch import Tensor

from vime.algorithms.advantages import discounted_sums
from vime.algorithms.policy import TokenLoss


def generalized_advantages(
    rewards_T: Tensor, values_T: Tensor, *, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv:1506.02438) over a response's steps: (advantages [T], returns [T]), in float64.

    rewards_T  [T] the reward for choosing each token
    values_T   [T] the critic's value of the state before each token; after the last token it is 0

    delta_t = r_t + gamma * V_{t+1} - V_t, and A_t = delta_t + gamma * lambd * A_{t+1}. The critic
    learns the return A_t + V_t. With lambd 1 this return is the discounted reward-to-go.
    """
    values_T = values_T.double()
    following_T = torch.cat([values_T[1:], values_T.new_zeros(1)])[: len(values_T)]
    delta_T = rewards_T.double() + gamma * following_T - values_T
    adv_T = discounted_sums(delta_T, gamma * lambd)
    return adv_T, adv_T + values_T


def clipped_value_loss(
    value_T: Tensor, old_value_T: Tensor, return_T: Tensor, *, clip: float
) -> TokenLoss:
    """Half the larger squared error: of the value, or of the value clipped to old_value +- clip.

    This is PPO's value clipping as in OpenAI's baselines. A value that has moved towards its return
    by more than `clip` gets no gradient.

    value_T      [T] critic being trained, carries grad
    old_value_T  [T] critic before this rollout's first step, no grad
    return_T     [T] target, no grad
    """
    held_T = old_value_T + (value_T - old_value_T).clamp(-clip, clip)
    free_loss_T = (value_T - return_T).square()
    held_loss_T = (held_T - return_T).square()
    loss_T = torch.maximum(free_loss_T, held_loss_T) / 2
    clipped_T = held_loss_T > free_loss_T
    return TokenLoss(loss_T, {"value_clipfrac": clipped_T.to(value_T.dtype)})
