"""Causal attention over packed sequences, on CPU and CUDA, with context parallelism.

Shapes: a pack of T tokens, H query heads, G key/value groups, D channels. Under context parallelism
of C ranks each rank holds T/C tokens of the pack, as `zigzag.py` cuts it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vime.backends.megatron.kernels.attention import attend
from vime.backends.megatron.kernels.choice import chosen
from vime.backends.megatron.kernels.spans import Spans
from vime.backends.megatron.model.pack import bounds_of, remembered, spans_of
from vime.backends.megatron.model.zigzag import seen_by


class PackedAttention(MegatronModule):
    """`core_attention` of the layer spec, for packs (THD) and plain batches ([S, B, H, D])."""

    def __init__(
        self, config: Any, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.cp_group = mpu.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,  # [T, H, D] or [S, B, H, D]
        key: Tensor,  # [T, G, D] or [S, B, G, D]
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[T, H*D] (or [S, B, H*D]): causal attention within each sequence."""
        if packed_seq_params is None:
            assert self.cp_group.size() == 1, "context parallelism needs packed sequences"
            q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            out = _sdpa(q, k, v, self.scale, is_causal=True)
            return out.permute(2, 0, 1, 3).flatten(2)
        queries = keys = spans_of(packed_seq_params)
        if self.cp_group.size() > 1:
            key, value, queries, keys = self._gathered(key, value, packed_seq_params)
        if query.is_cuda and query.dtype.itemsize == 2:
            out = attend(chosen().attention, query, key, value, queries, keys, self.scale)
        else:
            # split, not slices: the backward of each slice would fill a tensor of the pack's length
            parts = query.split(queries.lengths), key.split(keys.lengths), value.split(keys.lengths)
            out = torch.cat([_one(q, k, v, self.scale) for q, k, v in zip(*parts, strict=True)])
        return out.flatten(1)

    def _gathered(
        self, key: Tensor, value: Tensor, pack: PackedSeqParams
    ) -> tuple[Tensor, Tensor, Spans, Spans]:
        """The keys and values that each of this rank's query chunks sees, one chunk after another.

        Every rank gathers all keys and values; the backward of that gather is a reduce-scatter. If
        both chunks of a sequence see a row, the row occurs twice, and its two gradients add up.
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        order, queries, keys = remembered(
            pack, "seen", lambda: seen_by(bounds_of(pack), size, rank, key.device)
        )
        both = torch.cat([key, value], dim=-1)
        both = gather_from_sequence_parallel_region(both, True, self.cp_group)
        widths = [key.shape[-1], value.shape[-1]]
        key, value = both.index_select(0, order).split(widths, dim=-1)
        return key, value, queries, keys


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """[Q, H, D] of one sequence. If there are fewer queries than keys, they are the last ones."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    num_q, num_k = q.shape[2], k.shape[2]
    if num_q == num_k:
        out = _sdpa(q, k, v, scale, is_causal=True)
    else:
        mask = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).tril(num_k - num_q)
        out = _sdpa(q, k, v, scale, attn_mask=mask)
    return out.squeeze(0).transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, **mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **mask)
