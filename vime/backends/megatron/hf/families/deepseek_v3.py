"""DeepSeek-V3 (arXiv:2412.19437) and Moonlight (arXiv:2502.16982).

The first layers are dense. The others have shared experts and a sigmoid router, which corrects its
choice by a bias for each expert. The bias is not a parameter and stays as loaded, because nothing
in RL balances the experts. The norms inside latent attention use rms_norm_eps, as the engines do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vime.backends.megatron.hf.decoder import (
    HF_LAYER,
    LAYER,
    decoder_args,
    decoder_rules,
    glu_rules,
    refuse_if,
    rope_parameters,
)
from vime.backends.megatron.hf.family import Family, Kind, Rule
from vime.errors import ConfigError


def megatron_args(config: dict[str, Any]) -> dict[str, Any]:
    refuse_if(config, "attention_bias")
    _refuse_other_routing(config)
    first_dense, experts = config.get("first_k_dense_replace", 0), config["n_routed_experts"]
    num_layers, groups = config["num_hidden_layers"], config.get("n_group") or 1
    args = decoder_args(config, rope_types=("yarn",))
    args |= {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "kv_channels": config["v_head_dim"],
        **_rope(config),
        "num_experts": experts,
        "moe_layer_freq": [int(i >= first_dense) for i in range(num_layers)],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"]
        * config["n_shared_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }
    if groups > 1:
        args |= {"moe_router_num_groups": groups, "moe_router_group_topk": config["topk_group"]}
    return args


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = rope_parameters(config)
    if rope["rope_type"] == "default":
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast", 32),
        "beta_slow": rope.get("beta_slow", 1),
        "mscale": rope["mscale"],
        "mscale_all_dim": rope["mscale_all_dim"],
    }


_REMEDIES = {
    name: f' A published model has {name} "{value}": add it if a conversion has lost it.'
    for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"))
}


def _refuse_other_routing(config: dict[str, Any]) -> None:
    rope, topk_group = rope_parameters(config), config.get("topk_group") or 1
    grouped = (config.get("n_group") or 1) > 1
    fits = {
        # Without these two, vLLM routes by softmax and ignores the bias; transformers does neither.
        "scoring_func": config.get("scoring_func") == "sigmoid",
        "topk_method": config.get("topk_method") == "noaux_tc",
        "norm_topk_prob": bool(config.get("norm_topk_prob", True)),
        "rope_interleave": bool(config.get("rope_interleave", True)),
        # Megatron ranks a group by its best topk / topk_group experts, the model by its best two.
        "topk_group": not grouped or config["num_experts_per_tok"] // topk_group == 2,
        "mscale_all_dim": rope["rope_type"] != "yarn" or bool(rope.get("mscale_all_dim")),
        "moe_layer_freq": config.get("moe_layer_freq", 1) == 1,
    }
    problems = [
        f"--hf-checkpoint: {name} {config.get(name, rope.get(name))!r} in config.json is not "
        "supported for deepseek_v3." + _REMEDIES.get(name, "")
        for name, is_fitting in fits.items()
        if not is_fitting
    ]
    if problems:
        raise ConfigError(*problems)


def _attention(mcore: str, hf: str, kind: Kind, when: Callable = lambda args: True) -> Rule:
    names = (f"{HF_LAYER}self_attn.{hf}.weight",)
    return Rule(f"{LAYER}self_attention.{mcore}.weight", names, kind, when)


def _has_q_lora(args: dict[str, Any]) -> bool:
    return bool(args["q_lora_rank"])


def _has_whole_queries(args: dict[str, Any]) -> bool:
    return not args["q_lora_rank"]


_ATTENTION = (
    _attention("linear_q_proj", "q_proj", Kind.COLUMN, _has_whole_queries),
    _attention("linear_q_down_proj", "q_a_proj", Kind.COLUMN, _has_q_lora),
    _attention("q_layernorm", "q_a_layernorm", Kind.REPLICATED, _has_q_lora),
    _attention("linear_q_up_proj", "q_b_proj", Kind.COLUMN, _has_q_lora),
    _attention("linear_kv_down_proj", "kv_a_proj_with_mqa", Kind.COLUMN),
    _attention("kv_layernorm", "kv_a_layernorm", Kind.REPLICATED),
    _attention("linear_kv_up_proj", "kv_b_proj", Kind.COLUMN),
)
_ROUTER = (
    Rule(LAYER + "mlp.router.weight", (HF_LAYER + "mlp.gate.weight",), Kind.REPLICATED),
    Rule(
        LAYER + "mlp.router.expert_bias",
        (HF_LAYER + "mlp.gate.e_score_correction_bias",),
        Kind.REPLICATED,
    ),
)
_MLP = (
    *glu_rules("mlp.", "mlp."),
    *_ROUTER,
    *glu_rules("mlp.experts.local_experts.{e}.", "mlp.experts.{e}."),
    *glu_rules("mlp.shared_experts.", "mlp.shared_experts."),
)

_TINY = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.446,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32,
    "beta_slow": 1,
}

FAMILY = Family(
    model_type="deepseek_v3",
    title="DeepSeek-V3, Moonlight",
    differs="latent attention, shared experts, sigmoid router with a bias for each expert, YaRN",
    rules=decoder_rules(attention=_ATTENTION, mlp=_MLP),
    megatron_args=megatron_args,
    tiny={
        "Moonlight": _TINY
        | {"q_lora_rank": None, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1},
        "DeepSeek-V3": _TINY
        | {"q_lora_rank": 24, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"rope_parameters": _YARN},
    },
    extra_layers=1,
)
