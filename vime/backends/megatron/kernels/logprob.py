"""Statistics of a softmax over one rank's columns of logits; the gradient overwrites the logits.

The forward pass reads a row of logits once. The backward pass reads and writes it once. Memory
holds the logits' own type; only registers hold float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def statistics(logits: Tensor, local: Tensor, temperature: float) -> Tensor:
    """[4, T] float32: largest x, sum e, sum e * (x - largest), taken x; e = exp(x - largest).

    logits  [T, V] contiguous; x = logits / temperature
    local   [T] int64, the taken column; if it is outside 0..V-1, the taken x is 0
    """
    assert logits.is_contiguous()
    rows, columns = logits.shape
    out = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    if rows:
        _statistics[(rows,)](
            logits, local, out, rows, columns, 1.0 / temperature, BLOCK=BLOCK, num_warps=8
        )
    return out


def gradient_in_place(
    logits: Tensor,
    local: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """Overwrites `logits` [T, V] with their gradient and returns them.

    log_z    [T] log of the sum of exp(x) over every rank's columns
    entropy  [T] nats
    d_logp, d_entropy  [T] gradients of both results; None stands for zero
    """
    assert logits.is_contiguous()
    rows, columns = logits.shape
    zeros = torch.zeros_like(log_z) if d_logp is None else d_logp.float().contiguous()
    with_entropy = d_entropy is not None
    d_h = d_entropy.float().contiguous() if with_entropy else zeros
    if rows:
        grid = (rows, triton.cdiv(columns, BLOCK))
        _gradient[grid](
            logits,
            local,
            log_z,
            entropy,
            zeros,
            d_h,
            columns,
            1.0 / temperature,
            WITH_ENTROPY=with_entropy,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return logits


@triton.jit
def _statistics(X, Taken, Out, rows, columns, inverse_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = X + row * columns
    at = tl.arange(0, BLOCK)
    top = tl.full((), -1e38, tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for first in range(0, columns, BLOCK):
        inside = first + at < columns
        x = tl.load(start + first + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x * inverse_temperature, -1e38)
        higher = tl.maximum(top, tl.max(x, 0))
        shrink = tl.exp(top - higher)
        weighted = (weighted + (top - higher) * total) * shrink
        total *= shrink
        top = higher
        e = tl.exp(x - top)
        total += tl.sum(e, 0)
        weighted += tl.sum(tl.where(inside, e * (x - top), 0.0), 0)
    taken = tl.load(Taken + row)
    here = (taken >= 0) & (taken < columns)
    x = tl.load(start + tl.where(here, taken, 0)).to(tl.float32) * inverse_temperature
    tl.store(Out + row, top)
    tl.store(Out + rows + row, total)
    tl.store(Out + 2 * rows + row, weighted)
    tl.store(Out + 3 * rows + row, tl.where(here, x, 0.0))


@triton.jit
def _gradient(
    X,
    Taken,
    LogZ,
    Entropy,
    dLogp,
    dEntropy,
    columns,
    inverse_temperature,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d logp / d x_v = [v taken] - p_v;  d entropy / d x_v = -p_v (log p_v + entropy)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    here = X + row * columns + at
    x = tl.load(here, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    log_p = x - tl.load(LogZ + row)
    p = tl.exp(log_p)
    d_logp = tl.load(dLogp + row)
    grad = tl.where(at == tl.load(Taken + row), d_logp, 0.0) - p * d_logp
    if WITH_ENTROPY:
        grad -= p * (log_p + tl.load(Entropy + row)) * tl.load(dEntropy + row)
    tl.store(here, (grad * inverse_temperature).to(X.dtype.element_ty), mask=inside)
