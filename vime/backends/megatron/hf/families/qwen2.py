"""Qwen2 and Qwen2.5 (arXiv:2412.15115): llama-shaped, with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.decoder import decoder_args, decoder_rules
from vime.backends.megatron.hf.family import Family


def megatron_args(config: dict[str, Any]) -> dict[str, Any]:
    return decoder_args(config) | {"add_qkv_bias": True}


FAMILY = Family(
    model_type="qwen2",
    title="Qwen2, Qwen2.5",
    differs="biases on queries, keys and values",
    rules=decoder_rules(),
    megatron_args=megatron_args,
    tiny={"Qwen2.5": {"rope_theta": 1e6, "tie_word_embeddings": True}},
)
