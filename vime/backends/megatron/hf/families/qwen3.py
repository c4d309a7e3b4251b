"""Qwen3, dense (arXiv:2505.09388): llama-shaped, with RMSNorm on queries and keys."""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.decoder import decoder_args, decoder_rules, refuse_if
from vime.backends.megatron.hf.family import Family


def megatron_args(config: dict[str, Any]) -> dict[str, Any]:
    refuse_if(config, "attention_bias")
    return decoder_args(config) | {"qk_layernorm": True}


FAMILY = Family(
    model_type="qwen3",
    title="Qwen3",
    differs="norms on queries and keys",
    rules=decoder_rules(),
    megatron_args=megatron_args,
    tiny={"Qwen3": {"rope_theta": 1e6, "head_dim": 16}},
)
