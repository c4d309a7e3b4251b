"""The families vime knows. A new one is a file with a FAMILY and a line here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vime.backends.megatron.hf import deepseek_v3, glm4, llama, qwen2, qwen3, qwen3_moe
from vime.backends.megatron.hf.family import Family, layer_pattern
from vime.backends.megatron.hf.files import read_config
from vime.config import Config
from vime.errors import ConfigError

FAMILIES: dict[str, Family] = {
    model_type: module.FAMILY
    for module in (llama, qwen2, qwen3, qwen3_moe, glm4, deepseek_v3)
    for model_type in module.FAMILY.model_types
}


def family_for(hf_config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises ConfigError naming the known ones."""
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"--hf-checkpoint: model_type {model_type!r} in config.json is not one of "
            f"{sorted(FAMILIES)}, which vime can train."
        )
    return FAMILIES[model_type]


def described_by(hf_dir: str) -> dict[str, Any]:
    """The architecture in a folder's config.json, under Megatron's flag names.

    Raises CheckpointError without a config.json, ConfigError on what vime cannot train, and
    KeyError where it lacks a name.
    """
    hf_config = read_config(hf_dir)
    return family_for(hf_config).megatron_args(hf_config)


def model_args(cfg: Config) -> dict[str, Any]:
    """The architecture to build, under Megatron's flag names.

    config.json decides; a MODEL_ARG that it says nothing about is added, and under
    --override-model-config every MODEL_ARG wins.
    """
    found = described_by(cfg.model.hf_checkpoint)
    args = found | cfg.model.args if cfg.model.override else cfg.model.args | found
    if args.get("num_experts"):
        args["moe_layer_freq"] = layer_pattern(args.get("moe_layer_freq", 1), args["num_layers"])
    return args


def in_stored_dtype(cfg: Config) -> Config:
    """The same with `--dtype auto` settled as the dtype that config.json names, for converters."""
    hf_config = read_config(cfg.model.hf_checkpoint)
    stored = hf_config.get("dtype") or hf_config.get("torch_dtype")
    if cfg.model.dtype != "auto" or stored not in ("float32", "bfloat16"):
        return cfg
    return replace(cfg, model=replace(cfg.model, dtype=stored))
