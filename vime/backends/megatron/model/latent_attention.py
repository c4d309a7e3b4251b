"""Multi-head latent attention (arXiv:2412.19437) with the gradients of all its heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention, with a correct gradient of the keys' rotated part.

    All heads share that part. Its projection is split over tensor ranks and gathered. The backward
    pass of Megatron's gather gives each rank only its share of its own heads' gradient, so the
    other ranks' heads would not count (0.16 to 0.19).
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The layers that the spec names. The method of 0.19 would norm uncompressed queries."""
        names = "linear_q_proj linear_q_up_proj linear_kv_up_proj q_layernorm kv_layernorm"
        return {name: getattr(submodules, name) for name in names.split()}

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple:
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if mpu.get_tensor_model_parallel_world_size() > 1:
            key = _SharedTail.apply(key, self.config.qk_pos_emb_head_dim)
        return query, key, *rest


class _SharedTail(torch.autograd.Function):
    """The identity on keys [T, H, D] whose last `width` channels every head of every rank shares.

    The backward pass adds the gradients of the other ranks' heads to these channels.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, width: int) -> Tensor:
        ctx.width = width
        return key.view_as(key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad[..., -ctx.width :].sum(-2)
        total = own.clone()
        dist.all_reduce(total, group=mpu.get_tensor_model_parallel_group())
        grad = grad.clone()
        grad[..., 0, -ctx.width :] += total - own
        return grad, None
