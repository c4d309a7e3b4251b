"""The modules of a decoder layer: Megatron's own, with vime's norm and attention."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from vime.backends.megatron.kernels.choice import chosen
from vime.backends.megatron.model.attention import PackedAttention
from vime.backends.megatron.model.latent_attention import LatentAttention
from vime.backends.megatron.model.mlp import GatedMLP
from vime.backends.megatron.model.norm import NormedRowParallelLinear, RMSNorm
from vime.backends.megatron.model.self_attention import PackedSelfAttention


def decoder_spec(
    config: TransformerConfig, args: dict[str, Any], vp_stage: int | None = None
) -> Any:
    """The block spec of this pipeline stage's layers. `args`: the architecture.

    Megatron's local norm refuses sequence parallelism, and its local attention refuses packs.
    """
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention = parts.self_attention.submodules
        if not chosen().plain:
            parts.mlp = _gated(parts.mlp)
            if parts.self_attention.module is SelfAttention:
                parts.self_attention.module = PackedSelfAttention
        attention.core_attention = PackedAttention
        if config.multi_latent_attention:
            parts.self_attention.module = LatentAttention
            attention.kv_layernorm = RMSNorm
            # only compressed queries are normed
            attention.q_layernorm = IdentityOp if config.q_lora_rank is None else RMSNorm
        elif config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if args.get("post_self_attn_layernorm"):
            attention.linear_proj = NormedRowParallelLinear
        if args.get("post_mlp_layernorm"):
            _mlp_submodules(parts.mlp).linear_fc2 = NormedRowParallelLinear
    return spec


def _gated(mlp: Any) -> Any:
    """The spec of a dense layer with GatedMLP in it. The spec of an expert layer is unchanged.

    megatron-core 0.16 uses a ModuleSpec here, and warns about a ModuleSpec with an unknown module.
    megatron-core 0.19 uses a partial of the MLP's constructor for specs.
    """
    if isinstance(mlp, ModuleSpec) and mlp.module is MLP:
        return SimpleNamespace(module=GatedMLP, params=mlp.params, submodules=mlp.submodules)
    if isinstance(mlp, partial) and mlp.func == MLP.as_mlp_submodule:  # type: ignore[attr-defined]
        return partial(GatedMLP.as_mlp_submodule, *mlp.args, **mlp.keywords)  # type: ignore[attr-defined]
    return mlp


def _mlp_submodules(mlp: Any) -> Any:
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
