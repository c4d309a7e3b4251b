"""Checks MODEL_ARGS and the layout against config.json, before anything loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vime.backends.megatron.hf.compare import contradictions, fixed, strangers
from vime.backends.megatron.hf.registry import described_by, model_args
from vime.config import Config
from vime.config.hf_config import hf_config
from vime.config.sections.machine import ParallelConfig
from vime.errors import CheckpointError, ConfigError


def check_model_args(cfg: Config) -> list[str]:
    """One sentence per problem, each naming flag, value and remedy.

    Without a config.json the list is empty: the rule `checkpoint_is_there` reports that.
    """
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
    given = cfg.model.args
    differing = fixed if cfg.model.override else contradictions
    problems = [*differing(given, expected), *strangers(given, expected)]
    try:
        return problems + _layout_problems(cfg, model_args(cfg))
    except ValueError as error:
        return problems + [f"--moe-layer-freq: {error}. Correct it, or leave it out."]


def check_training(cfg: Config) -> list[str]:
    """The problems of `check_model_args`, and those that Megatron would find late or not at all.

    Megatron refuses some settings only in the first forward pass, and silently ignores others.
    """
    if not hf_config(cfg):
        return []  # `checkpoint_is_there` reports it
    if problems := check_model_args(cfg):
        return problems
    args, p = model_args(cfg), cfg.parallel
    if args.get("num_experts") and p.tp > 1 and not p.sequence_parallel:
        problems.append(
            f"--tensor-model-parallel-size {p.tp}: Megatron trains a model with experts only if "
            "the tokens are divided too. Add --sequence-parallel."
        )
    kind = args.get("moe_router_load_balancing_type", "none")
    coefficient = args.get("moe_aux_loss_coeff", 0.0)
    if kind not in _BALANCING:
        problems.append(
            f"--moe-router-load-balancing-type {kind} is not supported. Choose one of "
            f"{', '.join(_BALANCING)}."
        )
    elif coefficient and kind == "none":
        problems.append(
            f"--moe-aux-loss-coeff {coefficient} has no effect without the loss that it weighs. "
            "Add --moe-router-load-balancing-type aux_loss, or set it to 0."
        )
    if "mla_up_proj" in (p.recompute_modules or ()) and not args.get("multi_latent_attention"):
        problems.append(
            "--recompute-modules mla_up_proj: the model has no latent attention. Leave it out."
        )
    return problems


# With "sinkhorn" the trainer would route by another rule than the engines.
_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")


def _pipeline_problems(p: ParallelConfig, layers: int) -> Iterator[str]:
    given = " and ".join(f"{name} {number}" for name, number in p.end_stages.items())
    others, rest = p.pp - len(p.end_stages), layers - sum(p.end_stages.values())
    if rest < others or (rest and not others):
        yield (
            f"{given or f'--pipeline-model-parallel-size {p.pp}'}: of the model's {layers} layers, "
            f"{rest} are left for {others} other pipeline stages. Change the numbers of layers."
        )
    elif others and rest % others:
        yield (
            f"--pipeline-model-parallel-size {p.pp} does not divide the model's {layers} layers. "
            f"Choose a divisor of {layers}, or give --decoder-first-pipeline-num-layers or "
            "--decoder-last-pipeline-num-layers of its own."
            if not given
            else f"{given}: the {rest} layers that are left do not divide among {others} other "
            "pipeline stages. Change the numbers of layers."
        )
    else:
        of_each = (
            ("--virtual-pipeline-model-parallel-size", p.vpp),
            ("--num-layers-per-virtual-pipeline-stage", p.layers_per_virtual_stage),
        )
        for stage in dict.fromkeys(p.stage_layers(layers)):
            for name, size in of_each:
                if size and stage % size:
                    yield (
                        f"{name} {size} does not divide the {stage} layers of a pipeline stage. "
                        f"Choose a divisor of {stage}."
                    )


def _layout_problems(cfg: Config, args: dict[str, Any]) -> list[str]:
    p = cfg.parallel
    groups = args["num_query_groups"] if args.get("group_query_attention") else None
    experts = args.get("num_experts")
    shares = [
        ("--tensor-model-parallel-size", p.tp, "attention heads", args["num_attention_heads"]),
        ("--tensor-model-parallel-size", p.tp, "key/value heads", groups),
        ("--tensor-model-parallel-size", p.tp, "MLP channels", args["ffn_hidden_size"]),
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
    problems += _pipeline_problems(p, args["num_layers"])
    if p.ep > 1 and not experts:
        problems.append(
            f"--expert-model-parallel-size {p.ep}: the model has no experts. Set it to 1."
        )
    return problems
