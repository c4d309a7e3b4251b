"""Corrections for tokens that were not sampled by the weights that judge them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vime.algorithms.policy import SequenceSum, sequence_mean

LEVELS = ("token", "sequence", "geometric")
MODES = ("clip", "mask")
_LARGEST_LOG = 20.0  # exp stays finite, and so does its product with any sensible loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Importance weights between the engine that sampled and the trainer's old policy.

    level  token: exp(old_logp - rollout_logp); sequence: of the sum over the sequence; geometric:
           of its mean
    mode   clip: the weight is held at low .. high (TIS; low 0: only truncated from above);
           mask: outside low .. high it is 0 (IcePop on tokens, arXiv:2510.18855; masked importance
           sampling on sequences)
    veto   the weights of a whole sequence are 0 where one of its tokens' own ratio is below this:
           the trainer would hardly ever have said it; None: never
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
        token_log_T = log_T = (old_logp_T - rollout_logp_T).detach()
        if self.level == "sequence":
            log_T = sequence_sum(log_T)
        elif self.level == "geometric":
            log_T = sequence_mean(log_T, sequence_sum)
        else:
            assert self.level == "token", self.level
        raw_T = log_T.clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()
        held_T = raw_T.clamp(self.low, self.high)
        outside_T = held_T != raw_T
        if self.mode == "mask":
            held_T = torch.where(outside_T, 0.0, raw_T)
        stats = {"tis": raw_T, "tis_clipfrac": outside_T.to(raw_T.dtype)}
        if self.veto is not None:
            absurd_T = (token_log_T < math.log(self.veto)).to(raw_T.dtype)
            vetoed_T = sequence_sum(absurd_T) > 0
            held_T = torch.where(vetoed_T, 0.0, held_T)
            stats["tis_vetofrac"] = vetoed_T.to(raw_T.dtype)
        return held_T, stats


def stale_and_bad(
    logp_T: Tensor,
    old_logp_T: Tensor,
    adv_T: Tensor,
    sequence_sum: SequenceSum,
    *,
    delta: float,
) -> Tensor:
    """OPSM (DeepSeek-V3.2, arXiv:2512.02556): tokens [T], bool, that get no policy loss.

    Those with a negative advantage in a sequence whose mean of old_logp - logp is above delta.
    """
    drift_T = sequence_mean(old_logp_T - logp_T, sequence_sum)
    return (adv_T < 0) & (drift_T > delta)
