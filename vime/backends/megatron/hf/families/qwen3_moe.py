"""Qwen3 mixture of experts (arXiv:2505.09388): Qwen3 with a softmax router over small experts."""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.decoder import decoder_rules, dense_mlp_rules
from vime.backends.megatron.hf.families import qwen3
from vime.backends.megatron.hf.family import Family, Kind, Rule


def megatron_args(config: dict[str, Any]) -> dict[str, Any]:
    num_layers, every = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    pattern = [int(i not in dense and (i + 1) % every == 0) for i in range(num_layers)]
    return qwen3.megatron_args(config) | {
        "num_experts": config.get("num_local_experts") or config["num_experts"],
        "moe_layer_freq": pattern,
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        "moe_router_score_function": "softmax",
    }


_M, _H = "decoder.layers.{l}.mlp.", "model.layers.{l}.mlp."
_EXPERTS = (
    Rule(_M + "router.weight", (_H + "gate.weight",), Kind.REPLICATED),
    Rule(
        _M + "experts.local_experts.{e}.linear_fc1.weight",
        (_H + "experts.{e}.gate_proj.weight", _H + "experts.{e}.up_proj.weight"),
        Kind.GLU,
    ),
    Rule(
        _M + "experts.local_experts.{e}.linear_fc2.weight",
        (_H + "experts.{e}.down_proj.weight",),
        Kind.ROW,
    ),
)

FAMILY = Family(
    "qwen3_moe",
    decoder_rules(qk_norm=True, mlp=dense_mlp_rules() + _EXPERTS),
    megatron_args,
)
