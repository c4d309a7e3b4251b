"""An HF folder that holds the config.json of Qwen3-4B, and the configuration of a run on it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from vime.config import Config

QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}


def config_of(folder: Path, hf_config: dict[str, Any] | None = None, **sections: Any) -> Config:
    if hf_config is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(hf_config))
    needed = {"model": {"hf_checkpoint": str(folder)}, "batch": {"prompts": 1}}
    types = get_type_hints(Config)
    return Config(
        **{
            f.name: types[f.name](**(needed.get(f.name, {}) | sections.get(f.name, {})))
            for f in fields(Config)
        }
    )
