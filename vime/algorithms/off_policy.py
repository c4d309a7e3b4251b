"""Corrections for tokens that were sampled with older or otherwise different weights.

The keys of `LEVELS` and `MODES` are the choices of --tis-level and --tis-mode; the command line
reads them without loading torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vime.algorithms.policy import SequenceSum, sequence_mean
from vime.algorithms.ratios import ratio_of

if TYPE_CHECKING:
    from torch import Tensor


def token_level(log_ratio_T: Tensor, sequence_sum: SequenceSum) -> Tensor:
    """The token's own ratio."""
    return log_ratio_T


def sequence_level(log_ratio_T: Tensor, sequence_sum: SequenceSum) -> Tensor:
    """The product of all ratios in the token's sequence."""
    return sequence_sum(log_ratio_T)


def clip(raw_T: Tensor, held_T: Tensor) -> Tensor:
    """A weight beyond a bound becomes the bound. With a lower bound of 0 this is TIS."""
    return held_T


def mask(raw_T: Tensor, held_T: Tensor) -> Tensor:
    """A weight beyond a bound becomes 0.

    For tokens this is IcePop (arXiv:2510.18855), for sequences it is masked importance sampling.
    """
    return raw_T.where(raw_T == held_T, 0.0)


# log_ratio_T [T], sequence_sum -> the logarithm of each token's weight [T]
LEVELS: dict[str, Callable[[Tensor, SequenceSum], Tensor]] = {
    "token": token_level,
    "sequence": sequence_level,
    "geometric": sequence_mean,
}
# weights [T], the same held within the bounds [T] -> the weights to use [T]
MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"clip": clip, "mask": mask}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Importance weights: the trainer's old probability of a token over the engine's.

    low, high  bounds of a weight
    level      a key of `LEVELS`: the ratio that is a token's weight
    mode       a key of `MODES`: what happens to a weight beyond the bounds
    veto       a sequence gets weights of 0 if the ratio of one of its tokens is below this: the
               trainer would hardly ever choose that token. None: no veto
    """

    low: float = 0.0
    high: float = 2.0
    level: str = "token"
    mode: str = "clip"
    veto: float | None = None

    def weights(
        self, old_logp_T: Tensor, rollout_logp_T: Tensor, sequence_sum: SequenceSum
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights [T] without grad, and figures per token."""
        log_ratio_T = (old_logp_T - rollout_logp_T).detach()
        log_weight_T = LEVELS[self.level](log_ratio_T, sequence_sum)
        raw_T = ratio_of(log_weight_T)
        held_T = raw_T.clamp(self.low, self.high)
        weight_T = MODES[self.mode](raw_T, held_T)
        stats = {"tis": raw_T, "tis_clipfrac": (held_T != raw_T).to(raw_T.dtype)}
        if self.veto is not None:
            absurd_T = (log_ratio_T < math.log(self.veto)).to(raw_T.dtype)
            vetoed_T = sequence_sum(absurd_T) > 0
            weight_T = weight_T.where(~vetoed_T, 0.0)
            stats["tis_vetofrac"] = vetoed_T.to(raw_T.dtype)
        return weight_T, stats


def opsm_mask(
    logp_T: Tensor,
    old_logp_T: Tensor,
    adv_T: Tensor,
    sequence_sum: SequenceSum,
    *,
    delta: float,
) -> Tensor:
    """OPSM (DeepSeek-V3.2, arXiv:2512.02556): True [T] at the tokens that get no policy loss.

    Their advantage is negative, and the mean of old_logp - logp over their sequence exceeds delta.
    """
    drift_T = sequence_mean(old_logp_T - logp_T, sequence_sum)
    return (adv_T < 0) & (drift_T > delta)


def divergences(log_ratio_T: Tensor) -> dict[str, Tensor]:
    """How far the trainer is from the engine, estimated at each token that the engine sampled [T].

    log_ratio_T  [T] log(trainer / engine)

    kl and k3_kl estimate KL(engine || trainer). chi2 estimates the chi-squared divergence,
    E[ratio**2] - 1.
    """
    ratio_T = ratio_of(log_ratio_T)
    return {"kl": -log_ratio_T, "k3_kl": ratio_T - 1 - log_ratio_T, "chi2": ratio_T.square() - 1}
