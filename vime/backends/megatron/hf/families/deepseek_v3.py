"""DeepSeek-V3 (arXiv:2412.19437) and Moonlight (arXiv:2502.16982): latent attention, dense first
layers, then shared experts and a sigmoid router whose choice is corrected by a bias per expert.

The bias stays as loaded: nothing in RL balances the experts, and it is not a parameter. The norms
inside the latent attention take rms_norm_eps, as the engines do.
"""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.decoder import (
    decoder_args,
    decoder_rules,
    dense_mlp_rules,
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
    name: f' A model in the published form has {name} "{value}": add it where it was lost.'
    for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"))
}


def _refuse_other_routing(config: dict[str, Any]) -> None:
    rope, topk_group = rope_parameters(config), config.get("topk_group") or 1
    grouped = (config.get("n_group") or 1) > 1
    wanted = {
        # vLLM, told nothing, routes by softmax and without the bias; transformers never does.
        "scoring_func": config.get("scoring_func") == "sigmoid",
        "topk_method": config.get("topk_method") == "noaux_tc",
        "norm_topk_prob": bool(config.get("norm_topk_prob", True)),
        "rope_interleave": bool(config.get("rope_interleave", True)),
        # Megatron ranks groups by their best topk / topk_group experts, the model by its best two.
        "topk_group": not grouped or config["num_experts_per_tok"] // topk_group == 2,
        "mscale_all_dim": rope["rope_type"] != "yarn" or bool(rope.get("mscale_all_dim")),
        "moe_layer_freq": config.get("moe_layer_freq", 1) == 1,
    }
    problems = [
        f"--hf-checkpoint: {name} {config.get(name, rope.get(name))!r} in config.json is not "
        "supported for deepseek_v3." + _REMEDIES.get(name, "")
        for name, fits in wanted.items()
        if not fits
    ]
    if problems:
        raise ConfigError(*problems)


_ATTN, _HF_ATTN = "decoder.layers.{l}.self_attention.", "model.layers.{l}.self_attn."
_MLP, _HF_MLP = "decoder.layers.{l}.mlp.", "model.layers.{l}.mlp."


def _has_q_lora(args: dict[str, Any]) -> bool:
    return bool(args["q_lora_rank"])


_ATTENTION = (
    Rule(
        _ATTN + "linear_q_proj.weight",
        (_HF_ATTN + "q_proj.weight",),
        Kind.COLUMN,
        when=lambda args: not _has_q_lora(args),
    ),
    Rule(
        _ATTN + "linear_q_down_proj.weight",
        (_HF_ATTN + "q_a_proj.weight",),
        Kind.COLUMN,
        _has_q_lora,
    ),
    Rule(
        _ATTN + "q_layernorm.weight",
        (_HF_ATTN + "q_a_layernorm.weight",),
        Kind.REPLICATED,
        _has_q_lora,
    ),
    Rule(
        _ATTN + "linear_q_up_proj.weight", (_HF_ATTN + "q_b_proj.weight",), Kind.COLUMN, _has_q_lora
    ),
    Rule(
        _ATTN + "linear_kv_down_proj.weight", (_HF_ATTN + "kv_a_proj_with_mqa.weight",), Kind.COLUMN
    ),
    Rule(_ATTN + "kv_layernorm.weight", (_HF_ATTN + "kv_a_layernorm.weight",), Kind.REPLICATED),
    Rule(_ATTN + "linear_kv_up_proj.weight", (_HF_ATTN + "kv_b_proj.weight",), Kind.COLUMN),
)


def _glu_and_down(mcore: str, hf: str) -> tuple[Rule, ...]:
    gate_up = (hf + "gate_proj.weight", hf + "up_proj.weight")
    return (
        Rule(mcore + "linear_fc1.weight", gate_up, Kind.GLU),
        Rule(mcore + "linear_fc2.weight", (hf + "down_proj.weight",), Kind.ROW),
    )


_EXPERTS = (
    Rule(_MLP + "router.weight", (_HF_MLP + "gate.weight",), Kind.REPLICATED),
    Rule(_MLP + "router.expert_bias", (_HF_MLP + "gate.e_score_correction_bias",), Kind.REPLICATED),
    *_glu_and_down(_MLP + "experts.local_experts.{e}.", _HF_MLP + "experts.{e}."),
    *_glu_and_down(_MLP + "shared_experts.", _HF_MLP + "shared_experts."),
)

FAMILY = Family(
    "deepseek_v3",
    decoder_rules(attention=_ATTENTION, mlp=dense_mlp_rules() + _EXPERTS),
    megatron_args,
    extra_layers=1,
)
