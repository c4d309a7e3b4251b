"""The kernels in plain PyTorch, for machines without a GPU. Fused kernels must agree with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


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
    """See `qkv.split_qkv`."""
    tokens = mixed.shape[0]
    mixed = mixed.view(tokens, groups, heads_per_group + 2, -1)
    query, key, value = mixed.split([heads_per_group, 1, 1], dim=2)
    query, key = query.reshape(tokens, groups * heads_per_group, -1), key.squeeze(2)
    if q_weight is not None and k_weight is not None:
        query, key = rms_norm(query, q_weight, eps), rms_norm(key, k_weight, eps)
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    return (
        rotate(query, cos, sin, interleaved),
        rotate(key, cos, sin, interleaved),
        value.squeeze(2),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, D], its first R channels rotated by cos, sin [T, 1, R / 2] (arXiv:2104.09864)."""
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
