"""The architecture and the rules that llama-shaped decoders share.

RMSNorm, rotary positions, SwiGLU, grouped queries. A family starts from these and adds its own.
"""

from __future__ import annotations

from typing import Any

from vime.backends.megatron.hf.family import Kind, Rule
from vime.errors import ConfigError

LAYER, HF_LAYER = "decoder.layers.{l}.", "model.layers.{l}."


def decoder_args(config: dict[str, Any], *, rope_types: tuple[str, ...] = ()) -> dict[str, Any]:
    """The architecture of a plain decoder, under Megatron's flag names.

    rope_types  the kinds of rope scaling that the family reads from `rope_parameters(config)`
    Raises ConfigError if config.json has a feature that vime would silently leave out.
    """
    _refuse_unknown(config, ("default", *rope_types))
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "rotary_base": _plain(rope_parameters(config)["rope_theta"]),
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "apply_layernorm_1p": False,
        "swiglu": True,
        "disable_bias_linear": True,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "post_self_attn_layernorm": False,
        "post_mlp_layernorm": False,
        "multi_latent_attention": False,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "vocab_size": config["vocab_size"],
    }


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding, from either spelling of config.json: rope_theta, rope_type, ..."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {"rope_theta": config.get("rope_theta", 10000)} | scaling
    found["rope_type"] = scaling.get("rope_type") or scaling.get("type") or "default"
    return found


def refuse_if(config: dict[str, Any], name: str) -> None:
    """Raises ConfigError if config.json turns on a feature that the family has no weights for."""
    if config.get(name):
        raise ConfigError(
            f"--hf-checkpoint: {name} {config[name]!r} in config.json is not supported for "
            f"{config.get('model_type')}."
        )


def _refuse_unknown(config: dict[str, Any], rope_types: tuple[str, ...]) -> None:
    rope = rope_parameters(config)["rope_type"]
    problems = []
    if rope not in rope_types:
        problems.append(
            f"--hf-checkpoint: rope scaling {rope!r} in config.json is not supported for "
            f"{config.get('model_type')}. Remove rope_scaling to train without it."
        )
    if config.get("hidden_act", "silu") != "silu":
        problems.append(
            f"--hf-checkpoint: hidden_act {config['hidden_act']!r} in config.json is not "
            "supported; vime trains models with silu."
        )
    if config.get("use_sliding_window"):
        problems.append(
            "--hf-checkpoint: use_sliding_window true in config.json is not supported. "
            "Set it to false to train with full attention."
        )
    if config.get("quantization_config"):
        problems.append(
            "--hf-checkpoint: config.json has a quantization_config. Training needs plain weights: "
            "convert the folder to bfloat16 first."
        )
    if problems:
        raise ConfigError(*problems)


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def decoder_rules(
    *, attention: tuple[Rule, ...] = (), mlp: tuple[Rule, ...] = ()
) -> tuple[Rule, ...]:
    """The weights of a plain decoder.

    attention  replaces the rules of queries, keys, values and their norms
    mlp        replaces the rules of the dense MLP
    """
    m, h = LAYER, HF_LAYER
    return (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Kind.VOCAB),
        Rule(m + "input_layernorm.weight", (h + "input_layernorm.weight",), Kind.REPLICATED),
        *(attention or qkv_rules()),
        Rule(m + "self_attention.linear_proj.weight", (h + "self_attn.o_proj.weight",), Kind.ROW),
        Rule(
            m + "pre_mlp_layernorm.weight",
            (h + "post_attention_layernorm.weight",),
            Kind.REPLICATED,
        ),
        *(mlp or glu_rules("mlp.", "mlp.")),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Kind.REPLICATED),
        Rule("output_layer.weight", ("lm_head.weight",), Kind.VOCAB),
    )


def qkv_rules() -> tuple[Rule, ...]:
    """Queries, keys and values, with their biases and norms if the architecture has them."""
    m, h = LAYER + "self_attention.", HF_LAYER + "self_attn."
    return (
        Rule(m + "linear_qkv.weight", tuple(h + f"{x}_proj.weight" for x in "qkv"), Kind.QKV),
        Rule(
            m + "linear_qkv.bias",
            tuple(h + f"{x}_proj.bias" for x in "qkv"),
            Kind.QKV,
            when=lambda args: args["add_qkv_bias"],
        ),
        *(
            Rule(
                m + f"{x}_layernorm.weight",
                (h + f"{x}_norm.weight",),
                Kind.REPLICATED,
                when=lambda args: args["qk_layernorm"],
            )
            for x in "qk"
        ),
    )


def glu_rules(mcore: str, hf: str) -> tuple[Rule, ...]:
    """Gate, up and down of a SwiGLU.

    mcore, hf  the prefixes of its names within a layer, in Megatron and Hugging Face
    """
    m, h = LAYER + mcore, HF_LAYER + hf
    return (
        Rule(m + "linear_fc1.weight", (h + "gate_proj.weight", h + "up_proj.weight"), Kind.GLU),
        Rule(m + "linear_fc2.weight", (h + "down_proj.weight",), Kind.ROW),
    )
