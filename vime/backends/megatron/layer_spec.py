"""Which modules make up a decoder layer: Megatron's own, with vime's norm and attention."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from vime.backends.megatron.attention import PackedAttention
from vime.backends.megatron.latent_attention import LatentAttention
from vime.backends.megatron.norm import RMSNorm


class NormedRowParallelLinear(RowParallelLinear):
    """A projection back into the residual stream whose output passes an RMSNorm first."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias


def decoder_spec(
    config: TransformerConfig, args: dict[str, Any], vp_stage: int | None = None
) -> Any:
    """The block spec of this pipeline stage's layers. `args`: the architecture.

    The stock local norm refuses sequence parallelism and the stock local attention refuses packs.
    """
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention = parts.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.multi_latent_attention:
            parts.self_attention.module = LatentAttention
            attention.q_layernorm = attention.kv_layernorm = RMSNorm
        elif config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if args.get("post_self_attn_layernorm"):
            attention.linear_proj = NormedRowParallelLinear
        if args.get("post_mlp_layernorm"):
            parts.mlp.submodules.linear_fc2 = NormedRowParallelLinear
    return spec
