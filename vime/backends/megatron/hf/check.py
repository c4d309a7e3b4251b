"""MODEL_ARGS and the layout against config.json, before anything loads."""

from __future__ import annotations

import math
from typing import Any

from vime.backends.megatron.hf.family import layer_pattern
from vime.backends.megatron.hf.files import read_config
from vime.backends.megatron.hf.registry import family_for, model_args
from vime.config import Config, rules
from vime.errors import CheckpointError, ConfigError


def check_model_args(cfg: Config) -> list[str]:
    """One sentence per problem, each naming flag, value and remedy. Empty when all fits, and where
    there is no config.json to compare with, which the rule `checkpoint_is_there` tells."""
    if not rules.hf_config(cfg):
        return []
    try:
        hf_config = read_config(cfg.model.hf_checkpoint)
        expected = family_for(hf_config).megatron_args(hf_config)
    except CheckpointError as error:
        return [f"--hf-checkpoint {cfg.model.hf_checkpoint}: {error}"]
    except ConfigError as error:
        return list(error.problems)
    except KeyError as error:
        return [f"--hf-checkpoint {cfg.model.hf_checkpoint}: config.json lacks {error}."]
    problems = [] if cfg.model.override else _contradictions(cfg.model.args, expected)
    return problems + _layout_problems(cfg, model_args(cfg))


def _contradictions(given: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        f"--{name.replace('_', '-')} {given[name]} contradicts {expected[name]} in config.json of "
        "--hf-checkpoint. Drop the flag, or add --override-model-config to make it win."
        for name in given.keys() & expected.keys()
        if not _same(name, given[name], expected)
    ]


def _same(name: str, a: Any, expected: dict[str, Any]) -> bool:
    b = expected[name]
    if name == "moe_layer_freq":
        try:
            return layer_pattern(a, expected["num_layers"]) == b
        except ValueError:
            return False
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)  # config.json may hold a rounded float32
    return a == b


def _layout_problems(cfg: Config, args: dict[str, Any]) -> list[str]:
    p = cfg.parallel
    groups = args["num_query_groups"] if args.get("group_query_attention") else None
    experts = args.get("num_experts")
    shares = [
        ("--tensor-model-parallel-size", p.tp, "attention heads", args["num_attention_heads"]),
        ("--tensor-model-parallel-size", p.tp, "key/value heads", groups),
        ("--tensor-model-parallel-size", p.tp, "MLP channels", args["ffn_hidden_size"]),
        ("--pipeline-model-parallel-size", p.pp * (p.vpp or 1), "layers", args["num_layers"]),
        ("--expert-model-parallel-size", p.ep, "experts", experts),
    ]
    problems = [
        f"{flag} {size} does not divide the model's {count} {what}. Choose a divisor of {count}."
        for flag, size, what, count in shares
        if count and count % size
    ]
    if p.ep > 1 and not experts:
        problems.append(
            f"--expert-model-parallel-size {p.ep}: the model has no experts. Set it to 1."
        )
    return problems
