"""The policy loss that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from vime.algorithms.hooks import TrainingHooks, user_correction, user_loss
from vime.algorithms.objective import PolicyObjective
from vime.algorithms.off_policy import Mismatch
from vime.algorithms.policy import TokenLoss
from vime.config import AlgorithmConfig


def objective_of(a: AlgorithmConfig, hooks: TrainingHooks) -> Callable[..., TokenLoss]:
    """The policy loss that the flags ask for."""
    if hooks.loss is not None:
        return user_loss(hooks)
    estimator = a.estimator
    mismatch = Mismatch(
        low=a.tis_clip_low,
        high=a.tis_clip,
        level=a.tis_level,
        mode=a.tis_mode,
        veto=a.tis_veto,
    )
    return PolicyObjective(
        policy_loss=estimator.policy_loss,
        sequence_ratio=estimator.sequence_ratio,
        clip_low=a.clip_low,
        clip_high=a.clip_high,
        dual_clip=a.dual_clip,
        mismatch=mismatch if a.use_tis else None,
        correct=user_correction(hooks) if hooks.correct is not None else None,
        opsm_delta=a.opsm_delta if a.use_opsm else None,
        kl_coef=a.kl_loss_coef if a.use_kl_loss else 0.0,
        kl_type=a.kl_loss_type,
        unbiased_kl=a.unbiased_kl,
        entropy_coef=a.entropy_coef,
    )
