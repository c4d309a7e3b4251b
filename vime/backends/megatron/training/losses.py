"""The policy loss of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vime.algorithms.objective import PolicyObjective
from vime.algorithms.off_policy import Mismatch
from vime.algorithms.policy import TokenLoss
from vime.config import Config
from vime.config.view import ArgsView
from vime.plugins.hook import Plugin


def objective_of(cfg: Config) -> Callable[..., TokenLoss]:
    """The user's loss, or the policy loss of the flags. The parameters are `PolicyObjective`'s."""
    a = cfg.algorithm
    if loss := a.plugin("custom_loss_path"):
        return users_loss(loss, ArgsView(cfg))
    correct = a.plugin("custom_tis_path")
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
        correct=users_correction(correct, ArgsView(cfg)) if correct else None,
        opsm_delta=a.opsm_delta if a.use_opsm else None,
        kl_coef=a.kl_loss_coef if a.use_kl_loss else 0.0,
        kl_type=a.kl_loss_type,
        unbiased_kl=a.unbiased_kl,
        entropy_coef=a.entropy_coef,
    )


def users_loss(loss: Plugin, args: ArgsView) -> Callable[..., TokenLoss]:
    """--custom-loss-function-path as an objective."""

    def objective(logp_T: Tensor, **known: Any) -> TokenLoss:
        made = loss(args, logp_T, **known)
        if isinstance(made, TokenLoss):
            made = (made.value_T, made.stats)
        loss_T, stats = made
        return TokenLoss(loss_T, _detached(stats))

    return objective


def users_correction(
    correct: Plugin, args: ArgsView
) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """--custom-tis-function-path as `PolicyObjective.correct`."""

    def corrected(*, pg_loss: Tensor, **known: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss_T, stats = correct(args, pg_loss=pg_loss, **known)
        return loss_T, _detached(stats)

    return corrected


def _detached(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value_T.detach() for name, value_T in stats.items()}
