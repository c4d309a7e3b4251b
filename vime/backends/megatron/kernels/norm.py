"""RMSNorm: one Triton kernel for each pass. The arithmetic is in float32 and is rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Several programs per multiprocessor. Each sums the weight's gradient over its rows.
BACKWARD_PROGRAMS = 8 * 132


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, any leading shape, like `F.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        columns = x.shape[-1]
        rows = x.numel() // columns
        y = torch.empty_like(x)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(columns)
        _forward[(rows,)](x, weight, y, scale, columns, eps, BLOCK=block, num_warps=_warps(block))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        columns = x.shape[-1]
        rows = x.numel() // columns
        grad = grad.contiguous()
        dx = torch.empty_like(x)
        programs = max(1, min(BACKWARD_PROGRAMS, rows))
        partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(columns)
        _backward[(programs,)](
            grad, x, weight, scale, dx, partial, rows, columns, BLOCK=block, num_warps=_warps(block)
        )
        return dx, partial.sum(0).to(weight.dtype), None


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def _forward(X, W, Y, Scale, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(X + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / columns + eps)
    tl.store(Scale + row, scale)
    tl.store(Y + row * columns + at, (x * scale * w).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dY, X, W, Scale, dX, Partial, rows, columns, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    w = tl.load(W + at, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        here = row * tl.cast(columns, tl.int64) + at
        x = tl.load(X + here, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dY + here, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(Scale + row)
        x *= scale
        dw += dy * x
        dy *= w
        dx = (dy - x * (tl.sum(dy * x, 0) / columns)) * scale
        tl.store(dX + here, dx.to(dX.dtype.element_ty), mask=inside)
    tl.store(Partial + program.to(tl.int64) * columns + at, dw, mask=inside)
