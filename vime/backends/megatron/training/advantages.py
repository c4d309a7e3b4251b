"""Advantages of one rollout's tokens, from scores, penalties, a critic's values and a teacher."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from vime.algorithms.advantages import step_rewards, steps_of, whiten
from vime.algorithms.critic import generalized_advantages
from vime.algorithms.kl import kl_estimate
from vime.backends.megatron.training.rollout_columns import RolloutColumns
from vime.backends.megatron.training.totals import on_last_stage
from vime.config.sections.algorithm import AlgorithmConfig
from vime.config.view import ArgsView
from vime.plugins.hook import Plugin


def set_advantages(columns: RolloutColumns, cfg: AlgorithmConfig, args: ArgsView) -> None:
    """Fills `adv_N`, and with a critic `return_N`. A collective.

    The estimator, or the user's function in its place, computes them. With any estimator, --use-opd
    then subtracts each token's KL to the teacher. Whitening comes last.
    """
    if users := cfg.plugin("custom_advantage_path"):
        adv_N = _users_advantages(columns, users, args)
    elif cfg.estimator.critic:
        adv_N = _generalized(columns, cfg)
    else:
        adv_N = _spread(columns, cfg)
    if columns.teacher_logp_N is not None:
        adv_N = adv_N - cfg.opd_kl_coef * _kl_to(columns.teacher_logp_N, columns)
    if cfg.normalize_advantages or (cfg.estimator.whiten and users is None):
        adv_N = _whitened(adv_N, columns)
    columns.adv_N = adv_N


def _spread(columns: RolloutColumns, cfg: AlgorithmConfig) -> Tensor:
    """Each sequence's score, spread over its steps as the estimator does."""
    penalty_N = _penalty(columns, cfg).cpu()  # one transfer instead of one for each sequence
    adv_N = torch.zeros_like(penalty_N)
    for score, rows in _scores_and_steps(columns):
        adv_N[rows] = cfg.estimator.spread(score, penalty_N[rows], cfg.gamma)
    return adv_N.to(columns.adv_N.device)


def _generalized(columns: RolloutColumns, cfg: AlgorithmConfig) -> Tensor:
    """GAE over the steps of each sequence; also fills the returns."""
    assert columns.value_N is not None
    device = columns.adv_N.device
    columns.value_N = columns.whole(columns.value_N)
    value_N, penalty_N = columns.value_N.cpu(), _penalty(columns, cfg).double().cpu()
    adv_N, return_N = torch.zeros_like(value_N), torch.zeros_like(value_N)
    for score, rows in _scores_and_steps(columns):
        adv_T, return_T = generalized_advantages(
            step_rewards(score, penalty_N[rows]), value_N[rows], gamma=cfg.gamma, lambd=cfg.lambd
        )
        adv_N[rows], return_N[rows] = adv_T.float(), return_T.float()
    columns.return_N = return_N.to(device)
    return adv_N.to(device)


def _scores_and_steps(columns: RolloutColumns) -> Iterator[tuple[float, Tensor]]:
    """(score, rows of its steps) of each sequence that has a step."""
    mask_N = columns.table.mask_N.cpu()
    for position, response in columns.table.responses.items():
        rows = response.start + steps_of(mask_N[response])
        if len(rows):
            yield columns.batch.sequences[position].reward, rows


def _users_advantages(columns: RolloutColumns, users: Plugin, args: ArgsView) -> Tensor:
    """The advantages from the user's function on the last pipeline stage; 0 on other stages."""
    rows, adv_N = columns.table.responses, columns.table.column()
    old_N = columns.whole(columns.old_logp_N)
    ref_N = None if columns.ref_logp_N is None else columns.whole(columns.ref_logp_N)
    if on_last_stage() and rows:
        made = users(
            args,
            [columns.batch.sequences[p] for p in rows],
            [old_N[r] for r in rows.values()],
            None if ref_N is None else [ref_N[r] for r in rows.values()],
        )
        for r, adv_R in zip(rows.values(), made, strict=True):
            adv_N[r] = torch.as_tensor(adv_R).to(adv_N)
    return adv_N


def _penalty(columns: RolloutColumns, cfg: AlgorithmConfig) -> Tensor:
    """--kl-coef times each token's KL to the reference."""
    if not cfg.kl_coef or columns.ref_logp_N is None:
        return columns.table.column()
    return cfg.kl_coef * _kl_to(columns.ref_logp_N, columns)


def _kl_to(other_logp_N: Tensor, columns: RolloutColumns) -> Tensor:
    """KL(old policy || other) at each loss token."""
    kl_N = kl_estimate(columns.old_logp_N, other_logp_N, "k1")
    return columns.whole(kl_N) * columns.table.mask_N


def _whitened(adv_N: Tensor, columns: RolloutColumns) -> Tensor:
    """The advantages, whitened for each step over the loss tokens of all ranks."""
    white_N = torch.zeros_like(adv_N)
    for positions in columns.steps:
        white_N += whiten(adv_N, columns.loss_mask_of(positions), _sum_over_ranks)
    return white_N


def _sum_over_ranks(total: Tensor) -> Tensor:
    """The sum over the ranks that share a step's tokens."""
    dist.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return total
