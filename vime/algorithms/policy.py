"""Policy losses. One value per token, nothing reduced: the batch's weights do that."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A loss per token [T] with its gradient, and detached figures per token worth a mean."""

    value_T: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


def clipped_policy_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    adv_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """PPO clip (arXiv:1707.06347) with separate bounds (arXiv:2503.14476), one value per token.

    logp_T      [T] policy being trained, carries grad
    old_logp_T  [T] policy before this update, no grad
    adv_T       [T] advantage, already spread over tokens
    clip_low    the ratio is held at 1 - clip_low and above where the advantage is negative
    clip_high   the ratio is held at 1 + clip_high and below where the advantage is positive
    dual_clip   where the advantage is negative, the loss is at most dual_clip * |advantage|
                (arXiv:1912.09729); a value above 1
    """
    ratio_T = (logp_T - old_logp_T).exp()
    free_T = -ratio_T * adv_T
    held_T = -ratio_T.clamp(1 - clip_low, 1 + clip_high) * adv_T
    loss_T = torch.maximum(free_T, held_T)
    clipped_T = held_T > free_T
    if dual_clip is not None:
        ceiling_T = -dual_clip * adv_T
        over_T = (adv_T < 0) & (loss_T > ceiling_T)
        loss_T = torch.where(over_T, ceiling_T, loss_T)
        clipped_T = clipped_T | over_T
    stats = {
        "pg_clipfrac": clipped_T.to(logp_T.dtype),
        "ppo_kl": (old_logp_T - logp_T).detach(),
    }
    return TokenLoss(loss_T, stats)
