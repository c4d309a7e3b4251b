"""Two architectures under Megatron's flag names, compared name by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vime.backends.megatron.hf.family import layer_pattern
from vime.backends.megatron.hf.registry import described_by
from vime.config import Config
from vime.config.hf_config import read_config
from vime.config.spelling import as_flag
from vime.errors import CheckpointError, ConfigError


def contradictions(given: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One sentence for each of the MODEL_ARGS `given` that differs from config.json."""
    return [
        f"{as_flag(name)} {given[name]} contradicts {expected[name]} in config.json of "
        "--hf-checkpoint. Leave the flag out, or add --override-model-config to make it win."
        for name in given.keys() & expected.keys()
        if not _same(name, given[name], expected)
    ]


# What a run may choose for itself, because config.json does not say it.
CHOSEN = ("make_vocab_size_divisible_by",)
CHOSEN_OF_EXPERTS = (
    "moe_router_bias_update_rate",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
)
# Values that leave a part out, or that its other settings make idle.
_WITHOUT = {
    "moe_router_num_groups": 1,
    "moe_router_group_topk": 1,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_shared_expert_intermediate_size": 0,
    "rotary_scaling_factor": 1.0,
}


def strangers(given: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One sentence for each of the MODEL_ARGS `given` that the model has no part for.

    Megatron would ignore it, or build another model than the engines serve.
    """
    known = {*expected, *CHOSEN, *(CHOSEN_OF_EXPERTS if expected.get("num_experts") else ())}
    if expected.get("moe_router_score_function") == "sigmoid":
        known.add("moe_router_pre_softmax")  # has a meaning with softmax only
    return [
        f"{_said(name, value)} describes a part that the model of --hf-checkpoint does not have. "
        "Leave it out."
        for name, value in given.items()
        if name not in known and _WITHOUT.get(name) != value
    ]


def fixed(given: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One sentence for each of the MODEL_ARGS `given` that not even an override can change."""
    return [
        f"{_said(name, given[name])}: vime builds {expected[name]} only. Leave it out."
        for name in ("normalization", "position_embedding_type", "apply_layernorm_1p")
        if name in given and given[name] != expected[name]
    ]


def _said(name: str, value: Any) -> str:
    return as_flag(name) if value is True else f"{as_flag(name)} {value}"


def check_hf_fits(cfg: Config, hf_dir: Path) -> None:
    """Raises CheckpointError if a folder's weights belong to another model than --hf-checkpoint's.

    Comparing shapes would not find another rotary base or another epsilon.
    """
    own, its = read_config(cfg.model.hf_checkpoint), read_config(str(hf_dir))
    if its == own:
        return
    if its.get("model_type") != own.get("model_type"):
        kinds = f"model_type {its.get('model_type')}, not {own.get('model_type')}"
        raise CheckpointError(_not_fitting(cfg, [kinds]))
    try:
        expected = described_by(cfg.model.hf_checkpoint)
    except (ConfigError, KeyError):
        return  # `check_model_args` reports it
    try:
        found = described_by(str(hf_dir))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"config.json cannot be used: {error}") from None
    check_architecture_fits(cfg, found, expected)


def check_architecture_fits(cfg: Config, found: dict[str, Any], own: dict[str, Any]) -> None:
    """Like `check_hf_fits`, for architectures under Megatron's flag names. Raises CheckpointError.

    found  the architecture of the weights
    own    the architecture of --hf-checkpoint
    """
    # max_position_embeddings is a bound and shapes no weight
    shared = (found.keys() & own.keys()) - {"max_position_embeddings"}
    others = [n for n in own if n in shared and not _same(n, found[n], own)]
    if others:
        raise CheckpointError(_not_fitting(cfg, [f"{n} {found[n]}, not {own[n]}" for n in others]))


def _not_fitting(cfg: Config, differences: list[str]) -> str:
    return (
        f"the weights are of another architecture than --hf-checkpoint {cfg.model.hf_checkpoint} "
        f"describes: {'; '.join(differences)}. Choose weights of that architecture, or correct "
        "--hf-checkpoint."
    )


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
