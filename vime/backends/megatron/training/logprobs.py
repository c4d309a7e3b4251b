"""Log-probability of the taken token, and entropy, from logits whose columns are spread over ranks.

The sampler's temperature is applied, so trainer and engine measure the same distribution. The
backward pass needs the logits and no other tensor of their size. On a GPU, one kernel reads the
logits and another overwrites them with their gradient. PyTorch makes a float32 copy of one chunk of
tokens at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vime.backends.megatron.kernels.choice import chosen

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
    owned: bool = False,
) -> TokenLogProbs:
    """Log-probability and entropy, with gradients to the logits, equal on every rank of `group`.

    logits_TV    [T, V / ranks] this rank's columns, in order of rank; any float type
    taken_T      [T] ids in 0..V-1
    temperature  divides the logits; above 0
    group        the tensor-parallel ranks that share the vocabulary; None: this rank has all of it
    chunk_tokens  number of tokens whose float32 logits PyTorch holds at a time, as in
                 --log-probs-chunk-size; None: as many as fit in 64 MiB. The GPU's kernel makes no
                 float32 copy
    owned        no other code reads the logits: the backward pass may overwrite them, once
    """
    rows, columns = logits_TV.shape
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // max(columns, 1))
    if chosen().fused and logits_TV.is_cuda:
        steps: type = _Fused
        logits_TV = logits_TV.contiguous() if owned else logits_TV.clone()
    else:
        steps = _Chunked
    return TokenLogProbs(
        *_VocabParallel.apply(
            logits_TV, taken_T, temperature, group, steps(temperature, min(chunk, max(rows, 1)))
        )
    )


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        taken: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        steps: _Chunked | _Fused,
    ) -> tuple[Tensor, Tensor]:
        rank = 0 if group is None else group.rank()
        columns = logits.shape[1]
        local = taken - rank * columns
        top, *sums = steps.statistics(logits, local)
        # the taken logit minus the largest; 0 on ranks that do not have it
        here = (local >= 0) & (local < columns)
        sums = torch.stack([sums[0], sums[1], (sums[2] - top) * here])
        if group is not None and group.size() > 1:
            shared = top.clone()
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
            shift = top - shared  # <= 0: this rank's largest logit minus the largest of all
            sums[1] = (sums[1] + shift * sums[0]) * shift.exp()
            sums[0] *= shift.exp()
            sums[2] += shift * here
            dist.all_reduce(sums, group=group)
            top = shared
        log_z = sums[0].log()
        logp = sums[2] - log_z
        entropy = log_z - sums[1] / sums[0]
        ctx.save_for_backward(logits, local, top + log_z, entropy)
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple:
        """d logp / d x_v = [v taken] - p_v;  d entropy / d x_v = -p_v (log p_v + entropy)."""
        return ctx.steps.gradient(*ctx.saved_tensors, d_logp, d_entropy), None, None, None, None


class _Fused:
    """One kernel for each pass. The gradient overwrites the logits."""

    def __init__(self, temperature: float, _: int) -> None:
        self.temperature, self.spent = temperature, False

    def statistics(self, logits: Tensor, local: Tensor) -> Tensor:
        from vime.backends.megatron.kernels import logprob

        return logprob.statistics(logits, local, self.temperature)

    def gradient(self, logits: Tensor, *rest: Any) -> Tensor:
        from vime.backends.megatron.kernels import logprob

        assert not self.spent, "the first backward pass has written over the logits"
        self.spent = True
        return logprob.gradient_in_place(logits, *rest, self.temperature)


class _Chunked:
    """In PyTorch, `chunk` tokens at a time."""

    def __init__(self, temperature: float, chunk: int) -> None:
        self.temperature, self.chunk = temperature, chunk

    def statistics(self, logits: Tensor, local: Tensor) -> Tensor:
        """[4, T]: largest logit m; sum(exp(x - m)); sum(exp(x - m) * (x - m)); the taken logit."""
        local = local.clamp(0, max(logits.shape[1] - 1, 0))
        out = logits.new_empty(4, len(logits), dtype=torch.float32)
        for part in _chunks(len(logits), self.chunk):
            scaled = self._scaled(logits[part])
            out[3, part] = scaled.gather(-1, local[part, None])[:, 0]
            out[0, part] = scaled.amax(-1)
            scaled -= out[0, part, None]
            weight = scaled.exp()
            out[1, part] = weight.sum(-1)
            out[2, part] = weight.mul_(scaled).sum(-1)
        return out

    def gradient(
        self,
        logits: Tensor,
        local: Tensor,
        lse: Tensor,
        entropy: Tensor,
        d_logp: Tensor | None,
        d_entropy: Tensor | None,
    ) -> Tensor:
        here = (local >= 0) & (local < logits.shape[1])
        local = local.clamp(0, max(logits.shape[1] - 1, 0))
        grad = torch.empty_like(logits)
        for part in _chunks(len(logits), self.chunk):
            log_p = self._scaled(logits[part]).sub_(lse[part, None])
            p = log_p.exp()
            if d_entropy is None:
                d = p.mul_(-d_logp[part, None]) if d_logp is not None else torch.zeros_like(p)
            else:
                d = p * (log_p + entropy[part, None]) * -d_entropy[part, None]
                if d_logp is not None:
                    d -= p * d_logp[part, None]
            if d_logp is not None:
                d.scatter_add_(-1, local[part, None], (d_logp[part] * here[part])[:, None])
            grad[part] = d.div_(self.temperature)
        return grad

    def _scaled(self, logits: Tensor) -> Tensor:
        """Always a copy, in float32, because callers change it in place."""
        return logits.to(torch.float32, copy=True).div_(self.temperature)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]
