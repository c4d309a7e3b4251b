"""Self-attention over packs: Megatron's modules, and one kernel between projection and attention.

Megatron's own path rotates the sequences of a pack one by one. To do so it reads their lengths from
the device in every layer.
"""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from vime.backends.megatron.kernels.dispatch import split_qkv
from vime.backends.megatron.model.norm import RMSNorm
from vime.backends.megatron.model.pack import positions_of, remembered
from vime.backends.megatron.model.recompute import free_until_backward


class PackedSelfAttention(SelfAttention):
    """Attention for packs with rotary positions. Megatron handles everything else."""

    def forward(
        self,
        hidden_states: Tensor,  # [T, 1, hidden], or a share of T under sequence parallelism
        attention_mask: Tensor | None = None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shares_groups = self.config.num_query_groups < self.world_size
        if packed_seq_params is None or shares_groups or not isinstance(rotary_pos_emb, Tensor):
            return super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        mixed, _ = self.linear_qkv(hidden_states)
        free_until_backward(hidden_states, mixed)
        query, key, value = self._split(mixed.squeeze(1), rotary_pos_emb, packed_seq_params)
        attend = self.core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        out = attend(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params,
        )
        return self.linear_proj(out.unsqueeze(1))

    def _split(
        self, mixed: Tensor, frequencies: Tensor, pack: PackedSeqParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        cp = self.pg_collection.cp
        positions = positions_of(pack, mixed.shape[0], cp.size(), cp.rank())
        interleaved = self.config.rotary_interleaved
        cos, sin = remembered(pack, "rotary", lambda: _tables(frequencies, interleaved, mixed))
        groups = self.num_query_groups_per_partition
        norms = self.q_layernorm, self.k_layernorm
        # The norms are called as modules, because hooks on modules wait for the weights.
        weights = [norm(None) if isinstance(norm, RMSNorm) else None for norm in norms]
        return split_qkv(
            mixed,
            positions,
            cos,
            sin,
            *weights,
            self.config.layernorm_epsilon,
            groups,
            self.num_attention_heads_per_partition // groups,
            interleaved,
        )


def _tables(frequencies: Tensor, interleaved: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [P, R / 2] of Megatron's [P, 1, 1, R], which holds each angle twice.

    Their dtype is the model's, as in Hugging Face and vLLM.
    """
    angles = frequencies[:, 0, 0]
    angles = angles[:, ::2] if interleaved else angles[:, : angles.shape[-1] // 2]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
