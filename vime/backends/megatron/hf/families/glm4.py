"""GLM-4-0414 (arXiv:2406.12793).

Half of each head is rotated, in interleaved pairs. Attention and MLP have a norm before and after
them. `gate_up_proj` is one weight in the HF folder too.
"""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.decoder import (
    HF_LAYER,
    LAYER,
    decoder_args,
    decoder_rules,
    rope_parameters,
)
from vime.backends.megatron.hf.family import Family, Kind, Rule


def megatron_args(config: dict[str, Any]) -> dict[str, Any]:
    nested = rope_parameters(config).get("partial_rotary_factor")
    return decoder_args(config) | {
        "rotary_percent": nested or config.get("partial_rotary_factor", 0.5),
        "rotary_interleaved": True,
        "add_qkv_bias": bool(config.get("attention_bias", False)),
        "post_self_attn_layernorm": True,
        "post_mlp_layernorm": True,
    }


_MLP = (
    Rule(LAYER + "mlp.linear_fc1.weight", (HF_LAYER + "mlp.gate_up_proj.weight",), Kind.GLU_MERGED),
    Rule(LAYER + "mlp.linear_fc2.weight", (HF_LAYER + "mlp.down_proj.weight",), Kind.ROW),
)
_POST_NORMS = (
    Rule(
        LAYER + "self_attention.linear_proj.post_layernorm.weight",
        (HF_LAYER + "post_self_attn_layernorm.weight",),
        Kind.REPLICATED,
    ),
    Rule(
        LAYER + "mlp.linear_fc2.post_layernorm.weight",
        (HF_LAYER + "post_mlp_layernorm.weight",),
        Kind.REPLICATED,
    ),
)

FAMILY = Family(
    model_type="glm4",
    title="GLM-4-0414",
    differs="half-rotary in interleaved pairs, norms after attention and MLP, "
    "`gate_up_proj` in one",
    rules=decoder_rules(mlp=_MLP) + _POST_NORMS,
    megatron_args=megatron_args,
    tiny={"GLM4": {"head_dim": 16, "attention_bias": True}},
)
