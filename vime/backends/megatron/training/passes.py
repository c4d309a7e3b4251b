"""Packed forward and backward passes through Megatron's schedules, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from vime.backends.megatron.chunks import unwrap
from vime.backends.megatron.training.logprobs import TokenLogProbs, token_logprobs
from vime.backends.megatron.training.token_table import MicroBatch, TokenTable
from vime.backends.megatron.training.totals import Sums, on_last_stage

# A judge returns one micro-batch's loss, to be summed over micro-batches and ranks, and its sums.
Judge = Callable[[MicroBatch, TokenLogProbs], tuple[Tensor, Sums]]
OutputJudge = Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]]  # reads the model's output


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
    """Runs every micro-batch forward, and backward unless `forward_only`. A collective.

    judge         runs on the last pipeline stage; the other stages return {}
    chunk_tokens  as in `token_logprobs`
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
    judge: OutputJudge,
    *,
    forward_only: bool,
) -> Sums:
    """`run_pass` for a judge that reads the model's output: [1, T, logits or one value].

    Megatron divides a loss by the number of micro-batches, and gradients by the number of data and
    context parallel ranks. This function multiplies the loss by both numbers, so the gradients are
    the gradients of the sum.
    """
    scale = len(micro_batches) * mpu.get_data_parallel_world_size(with_context_parallel=True)

    def forward_step(batches: Any, chunk: nn.Module) -> tuple[Tensor, Callable]:
        batch = next(batches)
        masks = _masks_of_routers(chunk, batch)
        out = chunk(batch.tokens, batch.positions, None, packed_seq_params=batch.pack, **masks)

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
            seq_length=1,  # the schedule needs a number; packs bring their own lengths
            micro_batch_size=1,
            forward_only=forward_only,
        )
    total: Sums = {}
    for sums in results if on_last_stage() else ():
        for name, value in sums.items():
            total[name] = total[name] + value if name in total else value
    return total


def _masks_of_routers(chunk: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
    """The padding that routers leave out of their biases and losses; {} for a dense model.

    True marks padding, although Megatron's docstrings say the opposite. Under sequence parallelism
    Megatron divides the mask among the ranks on the first pipeline stage only.
    """
    model = unwrap(chunk)
    if not model.config.num_moe_experts:
        return {}
    mask = batch.padding
    if model.config.sequence_parallel and not model.pre_process:
        ranks = mpu.get_tensor_model_parallel_world_size()
        mask = mask.chunk(ranks, dim=1)[mpu.get_tensor_model_parallel_rank()]
    return {"padding_mask": mask}
