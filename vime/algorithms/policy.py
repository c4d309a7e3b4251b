"""Policy losses: one value per token, not reduced.

The batch gives each token its weight in the loss of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from vime.algorithms.ratios import ratio_of

if TYPE_CHECKING:
    from torch import Tensor

# values_T [T], no grad -> at each token the sum over its sequence [T], all ranks included
SequenceSum: TypeAlias = "Callable[[Tensor], Tensor]"


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A loss per token [T] with its gradient, and detached figures per token for the log."""

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
    adv_T       [T] advantage of each token
    clip_low    lower bound of the ratio is 1 - clip_low; it acts on negative advantages
    clip_high   upper bound of the ratio is 1 + clip_high; it acts on positive advantages
    dual_clip   a value above 1: on negative advantages, the loss is at most dual_clip * |advantage|
                (arXiv:1912.09729). None: no such limit
    """
    ratio_T = ratio_of(logp_T - old_logp_T)
    free_T = -ratio_T * adv_T
    held_T = -ratio_T.clamp(1 - clip_low, 1 + clip_high) * adv_T
    loss_T = free_T.maximum(held_T)
    clipped_T = held_T > free_T
    if dual_clip is not None:
        ceiling_T = -dual_clip * adv_T
        over_T = (adv_T < 0) & (loss_T > ceiling_T)
        loss_T = ceiling_T.where(over_T, loss_T)
        clipped_T = clipped_T | over_T
    stats = {
        "pg_clipfrac": clipped_T.to(logp_T.dtype),
        "ppo_kl": (old_logp_T - logp_T).detach(),
    }
    return TokenLoss(loss_T, stats)


PolicyLoss = Callable[..., TokenLoss]  # with the parameters of `clipped_policy_loss`


def cispo_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    adv_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """CISPO (arXiv:2506.13585): -sg(ratio clipped to 1 - clip_low .. 1 + clip_high) * A * logp.

    Every token keeps its gradient. A clip_low of 1 removes the lower bound, as in the paper. The
    shapes are as in `clipped_policy_loss`; `dual_clip` is ignored.
    """
    ratio_T = ratio_of(logp_T.detach() - old_logp_T)
    held_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    stats = {
        "pg_clipfrac": (held_T != ratio_T).to(logp_T.dtype),
        "ppo_kl": (old_logp_T - logp_T).detach(),
    }
    return TokenLoss(-held_T * adv_T * logp_T, stats)


def sequence_ratio(logp_T: Tensor, old_logp_T: Tensor, sequence_sum: SequenceSum) -> Tensor:
    """Old log-probabilities [T] that give each token the ratio of its sequence (GSPO).

    The ratio becomes exp(mean over the sequence of logp - old_logp). Its gradient with respect to
    logp_T equals the ratio. This is GSPO-token (arXiv:2507.18071, eq. 14). Its summed gradient
    equals the gradient of GSPO if all tokens of a sequence have the same advantage.
    """
    now_T = logp_T.detach()
    return now_T - sequence_mean(now_T - old_logp_T, sequence_sum)


def one_sequence(values_T: Tensor) -> Tensor:
    """The `SequenceSum` of tokens that all belong to one sequence."""
    return values_T.detach().sum().expand_as(values_T)


def sequence_mean(values_T: Tensor, sequence_sum: SequenceSum) -> Tensor:
    """At each token the mean over the loss tokens of its sequence [T]; no grad."""
    values_T = values_T.detach()
    return sequence_sum(values_T) / sequence_sum(values_T.new_ones(values_T.shape))
