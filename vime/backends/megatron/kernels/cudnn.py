"""cuDNN's attention, through PyTorch, for packs of long sequences.

cuDNN builds a plan for every new shape. If every sequence has its own length, the plans cost more
time than cuDNN saves. So a sequence is computed up to the end of a bucket: the rows that follow it
in the pack serve as padding. Causal attention keeps the padding out of the sequence's own rows, and
a gradient of zero at the padding keeps it out of the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_CALLS = 8  # other kernels take packs with more runs of equal lengths
BUCKET = 256

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float | None) -> Tensor:
    """[T, H, D] of q [T, H, D], k and v [T, G, D]; see `attention.attend`."""
    return _Cudnn.apply(q, k, v, runs_of(bounds), scale)


def runs_of(bounds: Sequence[int]) -> list[tuple[int, int]]:
    """(length, count) of each run of consecutive sequences of equal length."""
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    return [(length, len(list(same))) for length, same in groupby(lengths)]


class _Cudnn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: Sequence[tuple[int, int]],
        scale: float | None,
    ) -> Tensor:
        outs, kept, first = [], [], 0
        for length, count in runs:
            batch = [_batch(t, first, length, count) for t in (q, k, v)]
            out, lse, _, _, _, _, seed, offset, _ = _forward(
                *batch, None, True, 0.0, True, False, scale=scale
            )
            outs.append(out.transpose(1, 2)[:, :length].flatten(0, 1))
            kept += [lse, seed, offset]
            first += length * count
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.runs, ctx.scale = runs, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        q, k, v, out, *kept = ctx.saved_tensors
        grads: list[tuple[Tensor, ...]] = []
        first = 0
        for i, (length, count) in enumerate(ctx.runs):
            batch = [_batch(t, first, length, count) for t in (q, k, v, out)]
            rows = d_out[first : first + length * count].unflatten(0, (count, length))
            rows = _padded(rows, batch[0].shape[2]).transpose(1, 2)
            lse, seed, offset = kept[3 * i : 3 * i + 3]
            nothing = (None, None, None, batch[0].shape[2], batch[1].shape[2])
            found = _backward(rows, *batch, lse, seed, offset, *nothing, 0.0, True, scale=ctx.scale)
            grads.append(tuple(g.transpose(1, 2)[:, :length].flatten(0, 1) for g in found))
            first += length * count
        whole = (g[0] if len(g) == 1 else torch.cat(g) for g in zip(*grads, strict=True))
        return *whole, None, None


def _batch(t: Tensor, first: int, length: int, count: int) -> Tensor:
    """[count, H, S, D]: the rows of `count` sequences. A single sequence fills its bucket."""
    if count > 1:
        return t[first : first + length * count].unflatten(0, (count, length)).transpose(1, 2)
    size = -(-length // BUCKET) * BUCKET
    return _padded(t[first : first + size][None], size).transpose(1, 2)


def _padded(rows: Tensor, size: int) -> Tensor:
    """[B, size, H, D] of [B, at most size, H, D], with zeros at the end."""
    missing = size - rows.shape[1]
    return F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows
