"""The whole loss of one token: policy loss, KL to the reference, entropy bonus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vime.algorithms.kl import kl_estimate, unbiased_kl
from vime.algorithms.off_policy import Mismatch, opsm_mask
from vime.algorithms.policy import (
    PolicyLoss,
    SequenceSum,
    TokenLoss,
    clipped_policy_loss,
    one_sequence,
    sequence_ratio,
)

# --custom-tis-function-path, called with the keywords of `PolicyObjective._corrected`
Correction = Callable[..., tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObjective:
    """pg + kl_coef * KL(policy || reference) - entropy_coef * entropy.

    mismatch    multiplies pg by the importance weights of trainer against engine; None: no weights
    correct     a user's function in place of `mismatch`
    opsm_delta  sets pg to 0 at the tokens of `opsm_mask`; None: at no token
    """

    policy_loss: PolicyLoss = clipped_policy_loss
    sequence_ratio: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    mismatch: Mismatch | None = None
    correct: Correction | None = None
    opsm_delta: float | None = None
    kl_coef: float = 0.0
    kl_type: str = "k1"
    unbiased_kl: bool = False
    entropy_coef: float = 0.0

    def __call__(
        self,
        logp_T: Tensor,
        *,
        old_logp_T: Tensor,
        adv_T: Tensor,
        entropy_T: Tensor | None = None,
        ref_logp_T: Tensor | None = None,
        rollout_logp_T: Tensor | None = None,
        sequence_sum: SequenceSum = one_sequence,
    ) -> TokenLoss:
        """The loss [T] with grad. A term whose input is None is neither added nor reported.

        A term with coefficient 0 is reported but not added, so that an infinity in it cannot reach
        the weights.

        sequence_sum  sums over the sequence of each token; by default all tokens are one sequence
        """
        ratio_from_T = old_logp_T
        if self.sequence_ratio:
            ratio_from_T = sequence_ratio(logp_T, old_logp_T, sequence_sum)
        policy = self.policy_loss(
            logp_T,
            ratio_from_T,
            adv_T,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        loss_T, stats = self._corrected(
            policy.value_T, logp_T, old_logp_T, rollout_logp_T, adv_T, sequence_sum
        )
        stats = {"pg_loss": loss_T.detach(), **policy.stats, **stats}
        if ref_logp_T is not None:
            if self.unbiased_kl:
                kl_T = unbiased_kl(logp_T, old_logp_T, ref_logp_T, self.kl_type)
            else:
                kl_T = kl_estimate(logp_T, ref_logp_T, self.kl_type)
            stats["kl_loss"] = kl_T.detach()
            if self.kl_coef:
                loss_T = loss_T + self.kl_coef * kl_T
        if entropy_T is not None:
            stats["entropy_loss"] = entropy_T.detach()
            if self.entropy_coef:
                loss_T = loss_T - self.entropy_coef * entropy_T
        return TokenLoss(loss_T, stats)

    def _corrected(
        self,
        loss_T: Tensor,
        logp_T: Tensor,
        old_logp_T: Tensor,
        rollout_logp_T: Tensor | None,
        adv_T: Tensor,
        sequence_sum: SequenceSum,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss [T], corrected for tokens that other weights sampled, and its figures."""
        stats: dict[str, Tensor] = {}
        if self.correct is not None:
            loss_T, stats = self.correct(
                pg_loss=loss_T,
                train_log_probs=old_logp_T,
                rollout_log_probs=rollout_logp_T,
                sequence_sum=sequence_sum,
            )
        elif self.mismatch is not None:
            assert rollout_logp_T is not None
            weight_T, stats = self.mismatch.weights(old_logp_T, rollout_logp_T, sequence_sum)
            loss_T = loss_T * weight_T
        if self.opsm_delta is not None:
            drop_T = opsm_mask(logp_T, old_logp_T, adv_T, sequence_sum, delta=self.opsm_delta)
            loss_T = torch.where(drop_T, 0.0, loss_T)
            stats = {**stats, "opsm_clipfrac": drop_T.to(loss_T.dtype)}
        return loss_T, stats


def sft_loss(logp_T: Tensor) -> TokenLoss:
    """Negative log-likelihood [T] of the demonstrated tokens."""
    return TokenLoss(-logp_T)
