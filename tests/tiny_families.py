"""The config.json of tiny models of every family in the registry."""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.registry import FAMILIES

_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
TINY_MODELS: dict[str, dict[str, Any]] = {
    name: {"model_type": family.model_type} | _SHAPE | changes
    for family in FAMILIES.values()
    for name, changes in family.tiny.items()
}
