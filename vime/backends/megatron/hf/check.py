"""MODEL_ARGS and the layout against config.json, before anything loads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vime.backends.megatron.hf.family import layer_pattern
from vime.backends.megatron.hf.registry import described_by, model_args
from vime.config import Config
from vime.config.hf_config import hf_config, read_config
from vime.errors import CheckpointError, ConfigError


def check_model_args(cfg: Config) -> list[str]:
    """One sentence per problem, each naming flag, value and remedy. Empty when all fits, and where
    there is no config.json to compare with, which the rule `checkpoint_is_there` tells."""
    if not hf_config(cfg):
        return []
    try:
        expected = described_by(cfg.model.hf_checkpoint)
    except CheckpointError as error:
        return [f"--hf-checkpoint {cfg.model.hf_checkpoint}: {error}"]
    except ConfigError as error:
        return list(error.problems)
    except KeyError as error:
        return [f"--hf-checkpoint {cfg.model.hf_checkpoint}: config.json lacks {error}."]
    problems = [] if cfg.model.override else _contradictions(cfg.model.args, expected)
    return problems + _layout_problems(cfg, model_args(cfg))


def check_training(cfg: Config) -> list[str]:
    """`check_model_args`, and what Megatron would refuse only in the first forward pass, or leave
    out without a word."""
    if not hf_config(cfg):
        return []  # told by `checkpoint_is_there`
    if problems := check_model_args(cfg):
        return problems
    args, p = model_args(cfg), cfg.parallel
    if args.get("num_experts") and p.tp > 1 and not p.sequence_parallel:
        problems.append(
            f"--tensor-model-parallel-size {p.tp}: Megatron trains a model with experts only where "
            "the tokens are divided too. Add --sequence-parallel."
        )
    kind = args.get("moe_router_load_balancing_type", "none")
    coefficient = args.get("moe_aux_loss_coeff", 0.0)
    if kind not in _BALANCING:
        problems.append(
            f"--moe-router-load-balancing-type {kind} is none of {', '.join(_BALANCING)}. "
            "Choose one of these."
        )
    elif coefficient and kind == "none":
        problems.append(
            f"--moe-aux-loss-coeff {coefficient} has no effect without a loss that it weighs. Add "
            "--moe-router-load-balancing-type aux_loss, or set it to 0."
        )
    if "mla_up_proj" in (p.recompute_modules or ()) and not args.get("multi_latent_attention"):
        problems.append(
            "--recompute-modules mla_up_proj: the model has no latent attention. Leave it out."
        )
    return problems


def check_hf_fits(cfg: Config, hf_dir: Path) -> None:
    """The folder's weights belong into the model that --hf-checkpoint describes.

    Shapes would not tell of a rotary base or an epsilon that differs. Raises CheckpointError.
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
        return  # told by `check_model_args`
    try:
        found = described_by(str(hf_dir))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"config.json cannot be used: {error}") from None
    check_architecture_fits(cfg, found, expected)


def check_architecture_fits(cfg: Config, found: dict[str, Any], own: dict[str, Any]) -> None:
    """The same for an architecture under Megatron's flag names. Raises CheckpointError."""
    shared = (found.keys() & own.keys()) - {"max_position_embeddings"}  # a bound, not a weight's
    others = [n for n in own if n in shared and not _same(n, found[n], own)]
    if others:
        raise CheckpointError(_not_fitting(cfg, [f"{n} {found[n]}, not {own[n]}" for n in others]))


def _not_fitting(cfg: Config, differences: list[str]) -> str:
    return (
        f"the weights are of another architecture than --hf-checkpoint {cfg.model.hf_checkpoint} "
        f"describes: {'; '.join(differences)}. Choose weights of the same, or correct "
        "--hf-checkpoint."
    )


# "sinkhorn" would route by another rule than the engines do
_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")


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
        (
            "--expert-tensor-parallel-size",
            p.etp,
            "channels of an expert",
            args.get("moe_ffn_hidden_size"),
        ),
        (
            "--tensor-model-parallel-size",
            p.tp,
            "channels of the shared experts",
            args.get("moe_shared_expert_intermediate_size"),
        ),
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
