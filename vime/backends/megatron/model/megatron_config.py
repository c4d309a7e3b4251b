"""The architecture, the layout and the recomputation as Megatron's own config."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from vime import platform
from vime.backends.megatron.kernels.choice import chosen
from vime.backends.megatron.model import recompute
from vime.config import Config

# Megatron flags whose field in TransformerConfig has another name.
_RENAMED = {"num_experts": "num_moe_experts", "norm_epsilon": "layernorm_epsilon"}


def transformer_config(cfg: Config, args: dict[str, Any]) -> TransformerConfig:
    """Megatron's config. `args`: the architecture, whose names are Megatron's flag names."""
    kind = MLATransformerConfig if args.get("multi_latent_attention") else TransformerConfig
    known = {f.name for f in fields(kind)}
    named = {_RENAMED.get(k, k): v for k, v in args.items()}
    values = {k: v for k, v in named.items() if k in known}
    if not args.get("group_query_attention"):
        values["num_query_groups"] = args["num_attention_heads"]
    values.setdefault("moe_router_load_balancing_type", "none")
    values.setdefault("moe_router_dtype", "fp32")
    values.setdefault("moe_router_bias_update_rate", 0.0)
    if args.get("swiglu"):
        values |= {"activation_func": F.silu, "gated_linear_unit": True}
    values["add_bias_linear"] = not args.get("disable_bias_linear", False)
    config = kind(**values | _layout(cfg) | _numerics(cfg) | _modules())
    recompute.set_switches(config, cfg.parallel.recompute_modules)
    return config


def _layout(cfg: Config) -> dict[str, Any]:
    p = cfg.parallel
    again = p.recompute_modules
    values = {
        "tensor_model_parallel_size": p.tp,
        "pipeline_model_parallel_size": p.pp,
        "num_layers_in_first_pipeline_stage": p.first_stage_layers,
        "num_layers_in_last_pipeline_stage": p.last_stage_layers,
        "virtual_pipeline_model_parallel_size": p.vpp,
        "context_parallel_size": p.cp,
        "expert_model_parallel_size": p.ep,
        "expert_tensor_parallel_size": p.etp,
        "sequence_parallel": p.sequence_parallel and p.tp > 1,
        "recompute_granularity": p.recompute_granularity,
        "recompute_method": p.recompute_method,
        "recompute_num_layers": p.recompute_num_layers,
        "recompute_modules": [m for m in again if m not in recompute.OURS] if again else None,
        "variable_seq_lengths": True,  # packs differ in length
        "moe_token_dispatcher_type": "alltoall",  # the line above requires it, also without experts
    }
    if p.vpp:
        values |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return values


def _numerics(cfg: Config) -> dict[str, Any]:
    here = platform.current()
    dtype = here.dtype(cfg.model.dtype)
    return {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype.itemsize == 2,
        "pipeline_dtype": dtype,
        "attention_softmax_in_fp32": True,
        "use_cpu_initialization": not here.is_cuda,
        "perform_initialization": False,  # every weight is loaded
    }


def _modules() -> dict[str, Any]:
    """The switches of Megatron's fused operations. For most of them vime has its own kernels."""
    is_cuda, plain = platform.current().is_cuda, chosen().plain
    return {
        "gradient_accumulation_fusion": is_cuda and not plain,
        # Both are torch.compile'd. The second is one addition if there is no dropout.
        "bias_activation_fusion": is_cuda and plain,
        "bias_dropout_fusion": is_cuda and plain,
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }
