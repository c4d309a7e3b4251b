"""Qwen3, dense (arXiv:2505.09388): llama-shaped, with RMSNorm on queries and keys."""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.decoder import decoder_args, decoder_rules, refuse_if
from vime.backends.megatron.hf.family import Family


def megatron_args(config: dict[str, Any]) -> dict[str, Any]:
    refuse_if(config, "attention_bias")
    return decoder_args(config) | {"qk_layernorm": True}


FAMILY = Family("qwen3", decoder_rules(qk_norm=True), megatron_args)
