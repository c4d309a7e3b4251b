"""Qwen3 mixture of experts (arXiv:2505.09388): Qwen3 with a softmax router over small experts."""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.decoder import HF_LAYER, LAYER, decoder_rules, glu_rules
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


_EXPERTS = (
    Rule(LAYER + "mlp.router.weight", (HF_LAYER + "mlp.gate.weight",), Kind.REPLICATED),
    *glu_rules("mlp.experts.local_experts.{e}.", "mlp.experts.{e}."),
)

FAMILY = Family(
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    differs="softmax router, dense layers where config.json says so",
    rules=decoder_rules(mlp=glu_rules("mlp.", "mlp.") + _EXPERTS),
    megatron_args=megatron_args,
    tiny={
        "Qwen3-MoE": qwen3.FAMILY.tiny["Qwen3"]
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"norm_topk_prob": True, "mlp_only_layers": [0]},
    },
)
