"""Llama 2 and 3 (arXiv:2407.21783), and models of the same class such as SmolLM2."""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.decoder import (
    decoder_args,
    decoder_rules,
    refuse_if,
    rope_parameters,
)
from vime.backends.megatron.hf.family import Family


def megatron_args(config: dict[str, Any]) -> dict[str, Any]:
    refuse_if(config, "attention_bias")
    refuse_if(config, "mlp_bias")
    args = decoder_args(config, rope_types=("llama3",))
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        args |= {
            "use_rope_scaling": True,
            "rope_scaling_factor": rope["factor"],
            # Megatron has no flags for these; Llama 3.1 to 3.3 have 1, 4 and 8192.
            "rope_scaling_low_freq_factor": rope["low_freq_factor"],
            "rope_scaling_high_freq_factor": rope["high_freq_factor"],
            "rope_scaling_original_max_position": rope["original_max_position_embeddings"],
        }
    return args


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Every kind of frequency occurs within the 4 to 16 positions of the tests.
    "original_max_position_embeddings": 8,
}

FAMILY = Family(
    model_type="llama",
    title="Llama 2 and 3, SmolLM2",
    differs="Llama 3's rope scaling",
    rules=decoder_rules(),
    megatron_args=megatron_args,
    tiny={"Llama 3": {"rope_parameters": _LLAMA3}, "SmolLM2": {"tie_word_embeddings": True}},
)
