"""Packed forward and backward passes through Megatron's schedules, any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from vime.algorithms.critic import clipped_value_loss
from vime.algorithms.objective import sft_loss
from vime.algorithms.policy import SequenceSum, TokenLoss
from vime.backends.megatron.training.logprobs import TokenLogProbs, token_logprobs
from vime.backends.megatron.training.token_table import MicroBatch, TokenTable

Sums = dict[str, Tensor]  # name -> sum over this rank's tokens, a float32 scalar
Judge = Callable[[MicroBatch, TokenLogProbs], tuple[Tensor, Sums]]


def on_last_stage() -> bool:
    return mpu.is_pipeline_last_stage(ignore_virtual=True)


def run_pass(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[MicroBatch],
    table: TokenTable,
    judge: Judge,
    *,
    temperature: float,
    forward_only: bool,
    chunk_tokens: int | None = None,
) -> Sums:
    """Every micro-batch forward, and backward unless `forward_only`. A collective.

    chunk_tokens  as in `token_logprobs`
    judge  gives one micro-batch's loss, to be summed over micro-batches and ranks, and its sums. It
           runs on the last pipeline stage; the other stages return {}.

    Megatron divides a loss by the number of micro-batches, and gradients by the data and context
    parallel ranks. The loss is multiplied by both here, so gradients are those of the plain sum.
    """
    group = mpu.get_tensor_model_parallel_group()

    def judge_logits(batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Sums]:
        logps = token_logprobs(
            logits.squeeze(0),  # logits[0] would copy the gradient, which is as large
            table.targets_N[batch.rows_T],
            temperature=temperature,
            group=group,
            chunk_tokens=chunk_tokens,
            owned=True,
        )
        return judge(batch, logps)

    return run_chunks(chunks, micro_batches, judge_logits, forward_only=forward_only)


def run_chunks(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[MicroBatch],
    judge: Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]],
    *,
    forward_only: bool,
) -> Sums:
    """`run_pass` for a judge that reads what the model gives: [1, T, logits or one value]."""
    scale = len(micro_batches) * mpu.get_data_parallel_world_size(with_context_parallel=True)

    def forward_step(batches: Any, chunk: nn.Module) -> tuple[Tensor, Callable]:
        batch = next(batches)
        out = chunk(batch.tokens, batch.positions, None, packed_seq_params=batch.pack)

        def loss_of(output: Tensor) -> tuple[Tensor, Tensor, Sums]:
            loss, sums = judge(batch, output)
            one = torch.ones((), dtype=torch.int, device=loss.device)  # no division by tokens
            return loss * scale, one, sums

        return out, loss_of

    batches = [iter(micro_batches) for _ in chunks]
    with torch.set_grad_enabled(not forward_only):
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=1,  # packs bring their own; the schedule only needs a number
            micro_batch_size=1,
            forward_only=forward_only,
        )
    total: Sums = {}
    for sums in results if on_last_stage() else ():
        for name, value in sums.items():
            total[name] = total[name] + value if name in total else value
    return total


def remember_logps(column_N: Tensor) -> Judge:
    """A judge for forward-only passes: each token's log-probability goes into the column."""

    def judge(batch: MicroBatch, logps: TokenLogProbs) -> tuple[Tensor, Sums]:
        column_N[batch.rows_T] = logps.logp_T
        return logps.logp_T.new_zeros(()), {}

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
    on_policy   the weights are those that `old_logp_N` should come from: the pass then fills it,
                and the ratio is exactly 1
    own_logp_N  a column that takes what this pass computes
    spoilt_N    a column that stops being finite at tokens whose loss, or its gradient, is not
    """

    def judge(batch: MicroBatch, logps: TokenLogProbs) -> tuple[Tensor, Sums]:
        if on_policy:
            old_logp_N[batch.rows_T] = logps.logp_T.detach()
        if own_logp_N is not None:
            own_logp_N[batch.rows_T] = logps.logp_T.detach()
        kept_T = batch.kept_T
        rows_T = batch.rows_T[kept_T]
        logp_T = logps.logp_T[kept_T]
        _watch(logp_T, spoilt_N, rows_T)
        loss = objective(
            logp_T,
            old_logp_T=logp_T.detach() if on_policy else old_logp_N[rows_T],
            adv_T=adv_N[rows_T],
            entropy_T=logps.entropy_T[kept_T],
            ref_logp_T=None if ref_logp_N is None else ref_logp_N[rows_T],
            rollout_logp_T=table.rollout_logp_N[rows_T],
            sequence_sum=_sequence_sum(table, rows_T),
        )
        if spoilt_N is not None:
            spoilt_N[rows_T] += loss.value_T.detach() * table.weight_N[rows_T]
        return _weigh(loss.value_T, loss.stats, table.weight_N[rows_T])

    return judge


def sft_judge(table: TokenTable, spoilt_N: Tensor | None = None) -> Judge:
    """Negative log-likelihood of the response tokens; `spoilt_N` as in `policy_judge`."""

    def judge(batch: MicroBatch, logps: TokenLogProbs) -> tuple[Tensor, Sums]:
        kept_T = batch.kept_T
        weight_T = table.weight_N[batch.rows_T[kept_T]]
        loss = sft_loss(logps.logp_T[kept_T])
        if spoilt_N is not None:
            spoilt_N[batch.rows_T[kept_T]] += loss.value_T.detach() * weight_T
        entropy = {"entropy_loss": logps.entropy_T[kept_T].detach()}
        return _weigh(loss.value_T, entropy, weight_T)

    return judge


def _watch(logp_T: Tensor, spoilt_N: Tensor | None, rows_T: Tensor) -> None:
    """Adds each token's gradient to the column when it comes: a finite loss may have none."""
    if spoilt_N is not None and logp_T.requires_grad:

        def note(gradient_T: Tensor) -> None:
            spoilt_N[rows_T] += gradient_T

        logp_T.register_hook(note)


def value_judge(
    table: TokenTable, old_value_N: Tensor, return_N: Tensor, *, clip: float
) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]]:
    """The critic's loss, for `run_chunks`."""

    def judge(batch: MicroBatch, values: Tensor) -> tuple[Tensor, Sums]:
        rows_T = batch.rows_T[batch.kept_T]
        value_T = values[0, batch.kept_T, 0]
        loss = clipped_value_loss(value_T, old_value_N[rows_T], return_N[rows_T], clip=clip)
        return _weigh(loss.value_T, loss.stats, table.weight_N[rows_T])

    return judge


def remember_values(
    column_N: Tensor,
) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]]:
    """For forward-only passes: each token's value goes into the column."""

    def judge(batch: MicroBatch, values: Tensor) -> tuple[Tensor, Sums]:
        column_N[batch.rows_T] = values[0, :, 0]
        return values.new_zeros(()), {}

    return judge


def _sequence_sum(table: TokenTable, rows_T: Tensor) -> SequenceSum:
    """A sequence is in one micro-batch; context parallelism spreads it over ranks."""
    sequence_T = table.sequence_N[rows_T]

    def total(values_T: Tensor) -> Tensor:
        values_T = values_T.detach()
        sums_S = values_T.new_zeros(table.num_sequences + 1)
        sums_S.index_add_(0, sequence_T, values_T)
        if mpu.get_context_parallel_world_size() > 1:
            dist.all_reduce(sums_S, group=mpu.get_context_parallel_group())
        return sums_S[sequence_T]

    return total


def _weigh(loss_T: Tensor, stats: dict[str, Tensor], weight_T: Tensor) -> tuple[Tensor, Sums]:
    loss = (weight_T * loss_T).sum()
    sums = {name: (weight_T * value_T).sum() for name, value_T in stats.items()}
    return loss, {"loss": loss.detach(), "weight": weight_T.sum(), **sums}
