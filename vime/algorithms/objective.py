"""The whole loss of one token: the policy's part, the KL to the reference, the entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vime.algorithms.kl import kl_estimate
from vime.algorithms.policy import TokenLoss, clipped_policy_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObjective:
    """pg + kl_coef * KL(policy || reference) - entropy_coef * entropy."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_type: str = "k1"
    entropy_coef: float = 0.0

    def __call__(
        self,
        logp_T: Tensor,
        *,
        old_logp_T: Tensor,
        adv_T: Tensor,
        entropy_T: Tensor | None = None,
        ref_logp_T: Tensor | None = None,
    ) -> TokenLoss:
        """The loss [T] with grad. Terms whose input is None are left out and not reported.

        A term with coefficient 0 is reported without a gradient, so that a stray infinity in a
        figure that nobody trains on cannot reach the weights.
        """
        policy = clipped_policy_loss(
            logp_T,
            old_logp_T,
            adv_T,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        loss_T, stats = policy.value_T, {"pg_loss": policy.value_T.detach(), **policy.stats}
        if ref_logp_T is not None:
            kl_T = kl_estimate(logp_T, ref_logp_T, self.kl_type)
            stats["kl_loss"] = kl_T.detach()
            if self.kl_coef:
                loss_T = loss_T + self.kl_coef * kl_T
        if entropy_T is not None:
            stats["entropy_loss"] = entropy_T.detach()
            if self.entropy_coef:
                loss_T = loss_T - self.entropy_coef * entropy_T
        return TokenLoss(loss_T, stats)


def sft_loss(logp_T: Tensor) -> TokenLoss:
    """Negative log-likelihood [T] of the demonstrated tokens."""
    return TokenLoss(-logp_T)
