"""The model families by `model_type`, and the architecture that a run builds.

Every file of `families/` is in the registry: a new family needs no other line.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from vime.backends.megatron.hf import families
from vime.backends.megatron.hf.family import Family, layer_pattern
from vime.config import Config
from vime.config.hf_config import read_config
from vime.errors import ConfigError


def _found() -> dict[str, Family]:
    names = [f"{families.__name__}.{module.name}" for module in iter_modules(families.__path__)]
    found: list[Family] = [import_module(name).FAMILY for name in names]
    return {family.model_type: family for family in found}


FAMILIES = _found()


def family_for(hf_config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises ConfigError naming the known families."""
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"--hf-checkpoint: vime cannot train model_type {model_type!r} of config.json. It can "
            f"train {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def family_of(cfg: Config) -> Family:
    """The family of --hf-checkpoint. Raises as `described_by` does."""
    return family_for(read_config(cfg.model.hf_checkpoint))


def architecture(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The architecture that a config.json describes, under Megatron's flag names.

    Raises ConfigError if vime cannot train it, and KeyError if a name is missing.
    """
    return family_for(hf_config).megatron_args(hf_config)


def described_by(hf_dir: str) -> dict[str, Any]:
    """`architecture` of a folder. Also raises CheckpointError if there is no config.json."""
    return architecture(read_config(hf_dir))


def model_args(cfg: Config) -> dict[str, Any]:
    """The architecture to build, under Megatron's flag names.

    config.json decides. MODEL_ARGS add values that it lacks. Under --override-model-config they
    replace its values.
    """
    found = described_by(cfg.model.hf_checkpoint)
    args = found | cfg.model.args if cfg.model.override else cfg.model.args | found
    if args.get("num_experts"):
        args["moe_layer_freq"] = layer_pattern(args.get("moe_layer_freq", 1), args["num_layers"])
    return args


def in_stored_dtype(cfg: Config) -> Config:
    """For the converters: `--dtype auto` becomes the dtype that config.json names."""
    hf_config = read_config(cfg.model.hf_checkpoint)
    stored = hf_config.get("dtype") or hf_config.get("torch_dtype")
    if cfg.model.dtype != "auto" or stored not in ("float32", "bfloat16"):
        return cfg
    return replace(cfg, model=replace(cfg.model, dtype=stored))
