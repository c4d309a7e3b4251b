"""From one projection to queries, keys and values: split, RMSNorm per head, rotary embedding.

A row of the projection holds the groups one after another: the query heads of a group, its key
head, its value head (Megatron's layout). The value is returned as a view; query and key are written
once, contiguous. The arithmetic is in float32 and is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from vime.backends.megatron.kernels import qkv_triton

TOKENS = 16  # per program


def split_qkv(
    mixed: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    groups: int,
    heads_per_group: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(query [T, G * n, D], key [T, G, D], value [T, G, D]) of mixed [T, G * (n + 2) * D].

    positions           [T] int32, position of each token in its sequence
    cos, sin            [P, R / 2] of position times frequency; channels from R on are not rotated
    q_weight, k_weight  [D] weights of the norms; None for no norm
    interleaved         a pair is two neighbours (GPT-J), not channels R / 2 apart (GPT-NeoX)
    """
    return _SplitQKV.apply(
        mixed, q_weight, k_weight, positions, cos, sin, eps, groups, heads_per_group, interleaved
    )


class _SplitQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        groups: int,
        per_group: int,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, cos, sin = mixed.contiguous(), cos.contiguous(), sin.contiguous()
        tokens = mixed.shape[0]
        width = mixed.shape[1] // (groups * (per_group + 2))
        query = mixed.new_empty(tokens, groups * per_group, width)
        key = mixed.new_empty(tokens, groups, width)
        value = mixed.view(tokens, groups, per_group + 2, width)[:, :, per_group + 1]
        ctx.shape = (eps, groups, per_group, interleaved)
        ctx.save_for_backward(mixed, q_weight, k_weight, positions, cos, sin)
        ctx.set_materialize_grads(False)
        normed = q_weight is not None
        grid = (triton.cdiv(tokens, TOKENS), groups * (per_group + 1))
        qkv_triton.forward[grid](
            mixed,
            q_weight if normed else mixed,
            k_weight if normed else mixed,
            positions,
            cos,
            sin,
            query,
            key,
            tokens,
            width,
            2 * cos.shape[-1],
            eps,
            GROUPS=groups,
            PER_GROUP=per_group,
            NORMED=normed,
            INTERLEAVED=interleaved,
            TOKENS=TOKENS,
            WIDTH=triton.next_power_of_2(width),
        )
        return query, key, value

    @staticmethod
    def backward(
        ctx: Any, d_query: Tensor | None, d_key: Tensor | None, d_value: Tensor | None
    ) -> tuple:
        mixed, q_weight, k_weight, positions, cos, sin = ctx.saved_tensors
        eps, groups, per_group, interleaved = ctx.shape
        tokens = mixed.shape[0]
        width = mixed.shape[1] // (groups * (per_group + 2))
        grads = [
            mixed.new_zeros(tokens, heads, width) if g is None else g.contiguous()
            for g, heads in ((d_query, groups * per_group), (d_key, groups), (d_value, groups))
        ]
        d_mixed = torch.empty_like(mixed)
        normed = q_weight is not None
        blocks = triton.cdiv(tokens, TOKENS)
        partial = torch.empty(2, blocks, width, dtype=torch.float32, device=mixed.device)
        qkv_triton.backward[(blocks,)](
            *grads,
            mixed,
            q_weight if normed else mixed,
            k_weight if normed else mixed,
            positions,
            cos,
            sin,
            d_mixed,
            partial,
            tokens,
            width,
            2 * cos.shape[-1],
            eps,
            GROUPS=groups,
            PER_GROUP=per_group,
            NORMED=normed,
            INTERLEAVED=interleaved,
            TOKENS=TOKENS,
            WIDTH=triton.next_power_of_2(width),
        )
        d_weights = partial.sum(1).to(q_weight.dtype) if normed else (None, None)
        return d_mixed, d_weights[0], d_weights[1], *(None,) * 7
