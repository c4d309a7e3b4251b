"""SwiGLU (arXiv:2002.05202) over a projection whose rows hold the gate, then the value."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def swiglu(x: Tensor) -> Tensor:
    """[..., F] of [..., 2F]: silu of the first half times the second, in float32, rounded once."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        half = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], half)
        _forward[_grid(x, half)](x, y, half, BLOCK=BLOCK)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        half = x.shape[-1] // 2
        dx = torch.empty_like(x)
        _backward[_grid(x, half)](grad.contiguous(), x, dx, half, BLOCK=BLOCK)
        return dx


def _grid(x: Tensor, half: int) -> tuple[int, int]:
    return x.numel() // (2 * half), triton.cdiv(half, BLOCK)


@triton.jit
def _forward(X, Y, half, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    a = tl.load(X + row * 2 * half + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(X + row * 2 * half + half + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * half + at, (a * tl.sigmoid(a) * b).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dY, X, dX, half, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    a = tl.load(X + row * 2 * half + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(X + row * 2 * half + half + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dY + row * half + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.sigmoid(a)
    da = dy * b * gate * (1.0 + a * (1.0 - gate))
    db = dy * a * gate
    tl.store(dX + row * 2 * half + at, da.to(dX.dtype.element_ty), mask=inside)
    tl.store(dX + row * 2 * half + half + at, db.to(dX.dtype.element_ty), mask=inside)
