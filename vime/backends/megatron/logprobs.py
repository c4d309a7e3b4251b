"""Log-probability of the taken token, and entropy, from logits whose columns are spread over ranks.

Temperature is applied as the sampler applied it, so trainer and engine measure one distribution.
The float32 copy of the logits exists for one chunk of tokens at a time; nothing the size of the
logits is kept for the backward pass besides the logits themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # float32 logits of one chunk: 64 MiB


class TokenLogProbs(NamedTuple):
    logp_T: Tensor  # [T] float32, natural log
    entropy_T: Tensor  # [T] float32, nats


def token_logprobs(
    logits_TV: Tensor,
    taken_T: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> TokenLogProbs:
    """Both with gradients to the logits; equal on every rank of `group`.

    logits_TV    [T, V / ranks] this rank's columns, in order of rank; any float type
    taken_T      [T] ids in 0..V-1
    temperature  divides the logits, above 0
    group        the ranks that share the vocabulary (tensor parallel); None: this rank has it all
    """
    rows, columns = logits_TV.shape
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // max(columns, 1))
    return TokenLogProbs(
        *_VocabParallel.apply(logits_TV, taken_T, temperature, group, min(chunk, max(rows, 1)))
    )


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        taken: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ranks = 1 if group is None else group.size()
        rank = 0 if group is None else group.rank()
        rows, columns = logits.shape
        local = taken - rank * columns
        here = (local >= 0) & (local < columns)
        local = local.clamp(0, max(columns - 1, 0))
        # per token: largest logit; then sum(exp), sum(exp * logit), the taken logit, all shifted
        top = logits.new_empty(rows, dtype=torch.float32)
        sums = logits.new_empty(3, rows, dtype=torch.float32)
        for part in _chunks(rows, chunk):
            scaled = _scaled(logits[part], temperature)
            top[part] = scaled.amax(-1)
            scaled -= top[part, None]
            sums[2, part] = scaled.gather(-1, local[part, None])[:, 0]
            weight = scaled.exp()
            sums[0, part] = weight.sum(-1)
            sums[1, part] = weight.mul_(scaled).sum(-1)
        sums[2] *= here
        if ranks > 1:
            shared = top.clone()
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
            shift = top - shared  # <= 0: this rank's shift seen from the common one
            sums[1] = (sums[1] + shift * sums[0]) * shift.exp()
            sums[0] *= shift.exp()
            sums[2] += shift * here
            dist.all_reduce(sums, group=group)
            top = shared
        log_z = sums[0].log()
        logp = sums[2] - log_z
        entropy = log_z - sums[1] / sums[0]
        ctx.save_for_backward(logits, local, here, top + log_z, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple:
        """d logp / d x_v = [v taken] - p_v;  d entropy / d x_v = -p_v (log p_v + entropy)."""
        logits, local, here, lse, entropy = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for part in _chunks(len(logits), ctx.chunk):
            log_p = _scaled(logits[part], ctx.temperature).sub_(lse[part, None])
            p = log_p.exp()
            if d_entropy is None:
                d = p.mul_(-d_logp[part, None]) if d_logp is not None else torch.zeros_like(p)
            else:
                d = p * (log_p + entropy[part, None]) * -d_entropy[part, None]
                if d_logp is not None:
                    d -= p * d_logp[part, None]
            if d_logp is not None:
                d.scatter_add_(-1, local[part, None], (d_logp[part] * here[part])[:, None])
            grad[part] = d.div_(ctx.temperature)
        return grad, None, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """A float32 copy, always: what follows works in place."""
    return logits.to(torch.float32, copy=True).div_(temperature)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]
