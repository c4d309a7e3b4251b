"""Tiny models in HF format and the configurations that train them. Shared by the Megatron tests."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from vime.config import Config


def make_config(hf_dir: str | Path, **sections: dict[str, Any]) -> Config:
    """A Config with defaults everywhere; `parallel={"tp": 2}` sets fields of a section."""
    types = get_type_hints(Config)
    required = {
        "model": {"hf_checkpoint": str(hf_dir)},
        "batch": {"prompts": 2},
        "cluster": {"actor_gpus_per_node": 1},
    }
    return Config(
        **{
            f.name: types[f.name](**(required.get(f.name, {}) | sections.get(f.name, {})))
            for f in fields(Config)
        }
    )


def write_tiny_hf(
    folder: str | Path,
    *,
    tied: bool = False,
    moe: bool = False,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    **kw: Any,
) -> Path:
    """A Qwen3 of some 100k random parameters, saved by transformers. Returns the folder."""
    import transformers

    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
    } | kw
    torch.manual_seed(0)
    if moe:
        shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        config = transformers.Qwen3MoeConfig(**shape, norm_topk_prob=True)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.1 * noise if "norm" in name else 0.08 * noise)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)
