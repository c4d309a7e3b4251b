"""Judges: the last pipeline stage calls one for each micro-batch, to fill a column or for a loss.

A loss gives one value per token. The batch gave each token a weight. A step's loss is the sum of
weight times value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from vime.algorithms.critic import clipped_value_loss
from vime.algorithms.objective import sft_loss
from vime.algorithms.policy import SequenceSum, TokenLoss
from vime.backends.megatron.training.logprobs import TokenLogProbs
from vime.backends.megatron.training.passes import Judge, OutputJudge
from vime.backends.megatron.training.token_table import MicroBatch, TokenTable
from vime.backends.megatron.training.totals import Sums


def remember_logps(column_N: Tensor) -> Judge:
    """For forward-only passes: writes the log-probability of each token into the column."""

    def judge(batch: MicroBatch, logps: TokenLogProbs) -> tuple[Tensor, Sums]:
        column_N[batch.rows_T] = logps.logp_T
        return logps.logp_T.new_zeros(()), {}

    return judge


def remember_values(column_N: Tensor) -> OutputJudge:
    """For forward-only passes of a critic: writes the value of each token into the column."""

    def judge(batch: MicroBatch, values: Tensor) -> tuple[Tensor, Sums]:
        column_N[batch.rows_T] = values[0, :, 0]
        return values.new_zeros(()), {}

    return judge


def policy_judge(
    table: TokenTable,
    objective: Callable[..., TokenLoss],
    adv_N: Tensor,
    old_logp_N: Tensor,
    ref_logp_N: Tensor | None,
    *,
    on_policy: bool,
    own_logp_N: Tensor | None = None,
    spoilt_N: Tensor | None = None,
) -> Judge:
    """The policy loss.

    objective   called as `PolicyObjective` is
    on_policy   the old policy has the weights of this pass: the pass fills `old_logp_N`, and the
                ratio is exactly 1
    own_logp_N  a column to fill with the log-probabilities of this pass
    spoilt_N    a column; it becomes infinite or NaN where a token's loss or gradient is not finite
    """

    def judge(batch: MicroBatch, logps: TokenLogProbs) -> tuple[Tensor, Sums]:
        if on_policy:
            old_logp_N[batch.rows_T] = logps.logp_T.detach()
        if own_logp_N is not None:
            own_logp_N[batch.rows_T] = logps.logp_T.detach()
        kept_T = batch.kept_T
        rows_T = batch.rows_T[kept_T]
        logp_T = logps.logp_T[kept_T]
        if spoilt_N is not None:
            _add_gradient(spoilt_N, logp_T, rows_T)
        loss = objective(
            logp_T,
            old_logp_T=logp_T.detach() if on_policy else old_logp_N[rows_T],
            adv_T=adv_N[rows_T],
            entropy_T=logps.entropy_T[kept_T],
            ref_logp_T=None if ref_logp_N is None else ref_logp_N[rows_T],
            rollout_logp_T=table.rollout_logp_N[rows_T],
            sequence_sum=_sequence_sum(table, rows_T),
        )
        return _weighted(loss, table, rows_T, spoilt_N)

    return judge


def sft_judge(table: TokenTable, spoilt_N: Tensor | None = None) -> Judge:
    """Negative log-likelihood of the response tokens; `spoilt_N` as in `policy_judge`."""

    def judge(batch: MicroBatch, logps: TokenLogProbs) -> tuple[Tensor, Sums]:
        kept_T = batch.kept_T
        loss = sft_loss(logps.logp_T[kept_T])
        entropy = {"entropy_loss": logps.entropy_T[kept_T].detach()}
        loss = TokenLoss(loss.value_T, {**loss.stats, **entropy})
        return _weighted(loss, table, batch.rows_T[kept_T], spoilt_N)

    return judge


def value_judge(
    table: TokenTable, old_value_N: Tensor, return_N: Tensor, *, clip: float
) -> OutputJudge:
    """The critic's loss."""

    def judge(batch: MicroBatch, values: Tensor) -> tuple[Tensor, Sums]:
        rows_T = batch.rows_T[batch.kept_T]
        value_T = values[0, batch.kept_T, 0]
        loss = clipped_value_loss(value_T, old_value_N[rows_T], return_N[rows_T], clip=clip)
        return _weighted(loss, table, rows_T)

    return judge


def _weighted(
    loss: TokenLoss, table: TokenTable, rows_T: Tensor, spoilt_N: Tensor | None = None
) -> tuple[Tensor, Sums]:
    """The loss of the micro-batch, and its sums for the log: loss, weight, weighted figures."""
    weight_T = table.weight_N[rows_T]
    weighted_T = weight_T * loss.value_T
    if spoilt_N is not None:
        spoilt_N[rows_T] += weighted_T.detach()
    total = weighted_T.sum()
    sums = {name: (weight_T * value_T).sum() for name, value_T in loss.stats.items()}
    return total, {**sums, "loss": total.detach(), "weight": weight_T.sum()}


def _add_gradient(column_N: Tensor, logp_T: Tensor, rows_T: Tensor) -> None:
    """Adds each token's gradient to the column in the backward pass.

    A finite loss may have an infinite gradient.
    """

    def add(gradient_T: Tensor) -> None:
        column_N[rows_T] += gradient_T

    if logp_T.requires_grad:
        logp_T.register_hook(add)


def _sequence_sum(table: TokenTable, rows_T: Tensor) -> SequenceSum:
    """Sums over sequences.

    A sequence is in one micro-batch, but context parallelism spreads its tokens over ranks.
    """
    sequence_T = table.sequence_N[rows_T]

    def sequence_sum(values_T: Tensor) -> Tensor:
        values_T = values_T.detach()
        sums_S = values_T.new_zeros(table.num_sequences + 1)
        sums_S.index_add_(0, sequence_T, values_T)
        if mpu.get_context_parallel_world_size() > 1:
            dist.all_reduce(sums_S, group=mpu.get_context_parallel_group())
        return sums_S[sequence_T]

    return sequence_sum
