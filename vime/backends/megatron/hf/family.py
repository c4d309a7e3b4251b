"""What a model family is: how its weights are called on either side, and its architecture.

A family is one file of this folder: a table of `Rule`s and a function that reads `config.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vime.errors import ConfigError


class Kind(Enum):
    """How Megatron lays a weight out over tensor parallel ranks."""

    REPLICATED = "the same on every rank"
    VOCAB = "rows are the vocabulary, padded to an even share"
    COLUMN = "rows are split"
    ROW = "columns are split"
    GLU = "gate and up are one weight; each is split by rows"
    GLU_MERGED = "the same, and one weight in the HF folder too"
    QKV = "query, key and value are one weight, grouped by key/value head; groups are split"

    @property
    def is_replicated(self) -> bool:
        return self is Kind.REPLICATED


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron weight and the HF tensors that it is made of.

    {l} in a name is the layer's number in the whole model, {e} the expert's. A rule with `when`
    holds for architectures (see `Family.megatron_args`) of which it is true.
    """

    mcore: str
    hf: tuple[str, ...]
    kind: Kind
    when: Callable[[dict[str, Any]], bool] = lambda args: True

    @property
    def is_expert(self) -> bool:
        return "{e}" in self.mcore


@dataclass(frozen=True, slots=True)
class Weight:
    """A rule applied to one layer and expert."""

    mcore: str
    hf: tuple[str, ...]
    kind: Kind
    expert: int | None


@dataclass(frozen=True, slots=True)
class Family:
    """
    megatron_args  config.json -> the architecture under Megatron's flag names (dests)
    tied           HF name of the output weight that tied embeddings leave out
    ignored        HF names (patterns) that hold nothing to load
    extra_layers   layers that may follow the last one and are not trained (multi-token prediction)
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    megatron_args: Callable[[dict[str, Any]], dict[str, Any]]
    tied: str = "lm_head.weight"
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    extra_layers: int = 0

    def weights(self, args: dict[str, Any]) -> Iterator[Weight]:
        """Every weight of the whole model. `args`: the architecture, see `megatron_args`."""
        layers, experts = args["num_layers"], args.get("num_experts") or 0
        tied = not args["untie_embeddings_and_output_weights"]
        moe = moe_layers(args)
        rules = [r for r in self.rules if r.when(args)]
        head = [r for r in rules if "{l}" not in r.mcore]
        body = [r for r in rules if "{l}" in r.mcore]
        for rule in head:
            if not (tied and self.tied in rule.hf):
                yield Weight(rule.mcore, rule.hf, rule.kind, None)
        for layer in range(layers):
            for rule in body:
                if layer in moe and _is_dense_mlp(rule) or layer not in moe and _is_moe(rule):
                    continue
                for expert in range(experts) if rule.is_expert else (None,):
                    at = {"l": layer, "e": expert}
                    names = tuple(name.format(**at) for name in rule.hf)
                    yield Weight(rule.mcore.format(**at), names, rule.kind, expert)

    def is_ignored(self, hf_name: str, args: dict[str, Any]) -> bool:
        """A stored tensor that may be left alone: a derived one, or a tied weight stored twice."""
        if hf_name == self.tied and not args["untie_embeddings_and_output_weights"]:
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", hf_name)
        if layer and args["num_layers"] <= int(layer[1]) < args["num_layers"] + self.extra_layers:
            return True
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)


def moe_layers(args: dict[str, Any]) -> set[int]:
    """Which layers hold experts: Megatron's --moe-layer-freq, a number or one entry per layer."""
    if not args.get("num_experts"):
        return set()
    pattern = layer_pattern(args.get("moe_layer_freq", 1), args["num_layers"])
    return {i for i, on in enumerate(pattern) if on}


def layer_pattern(freq: int | str | list[int], num_layers: int) -> list[int]:
    """--moe-layer-freq spelled out: 1 for a layer with experts. "([0]*1+[1]*3)" is [0, 1, 1, 1].

    Raises ValueError on a text that is no such pattern.
    """
    if isinstance(freq, int):
        return [int(i % freq == 0) for i in range(num_layers)]
    if isinstance(freq, list):
        return freq
    text = freq.replace(" ", "").strip("()")
    if not re.fullmatch(r"\[[01](,[01])*\](\*\d+)?(\+\[[01](,[01])*\](\*\d+)?)*", text):
        raise ValueError(f"{freq!r} is not a pattern such as ([0]*1+[1]*47)")
    pattern: list[int] = []
    for term in text.split("+"):
        digits, _, times = term.partition("*")
        pattern += [int(d) for d in digits.strip("[]").split(",")] * int(times or 1)
    return pattern


def _is_moe(rule: Rule) -> bool:
    return rule.is_expert or ".mlp.router." in rule.mcore or ".mlp.shared_experts." in rule.mcore


def _is_dense_mlp(rule: Rule) -> bool:
    return ".mlp.linear_fc" in rule.mcore


def decoder_args(config: dict[str, Any], *, rope_types: tuple[str, ...] = ()) -> dict[str, Any]:
    """What families of this shape share: RMSNorm, rotary positions, SwiGLU, grouped queries.

    rope_types  the kinds of rope scaling that the family reads from `rope_parameters(config)`
    Raises ConfigError on a feature of config.json that would be silently left out.
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


def refuse_if(config: dict[str, Any], name: str) -> None:
    """Raises ConfigError if config.json turns on what the family has no weights for."""
    if config.get(name):
        raise ConfigError(
            f"--hf-checkpoint: {name} {config[name]!r} in config.json is not supported for "
            f"{config.get('model_type')}."
        )


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def decoder_rules(
    *,
    qk_norm: bool = False,
    attention: tuple[Rule, ...] = (),
    mlp: tuple[Rule, ...] = (),
) -> tuple[Rule, ...]:
    """The table that llama-shaped families share.

    attention  replaces the rules of queries, keys, values and their norms
    mlp        replaces the dense MLP's two rules
    """
    m, h = "decoder.layers.{l}.", "model.layers.{l}."
    return (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Kind.VOCAB),
        Rule(m + "input_layernorm.weight", (h + "input_layernorm.weight",), Kind.REPLICATED),
        *(attention or qkv_rules(qk_norm=qk_norm)),
        Rule(m + "self_attention.linear_proj.weight", (h + "self_attn.o_proj.weight",), Kind.ROW),
        Rule(
            m + "pre_mlp_layernorm.weight",
            (h + "post_attention_layernorm.weight",),
            Kind.REPLICATED,
        ),
        *(mlp or dense_mlp_rules()),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Kind.REPLICATED),
        Rule("output_layer.weight", ("lm_head.weight",), Kind.VOCAB),
    )


def qkv_rules(*, qk_norm: bool = False) -> tuple[Rule, ...]:
    """Queries, keys and values; their biases under --add-qkv-bias; their norms."""
    m, h = "decoder.layers.{l}.self_attention.", "model.layers.{l}.self_attn."
    rules = [
        Rule(m + "linear_qkv.weight", tuple(h + f"{x}_proj.weight" for x in "qkv"), Kind.QKV),
        Rule(
            m + "linear_qkv.bias",
            tuple(h + f"{x}_proj.bias" for x in "qkv"),
            Kind.QKV,
            when=lambda args: args["add_qkv_bias"],
        ),
    ]
    if qk_norm:
        rules += [
            Rule(m + f"{x}_layernorm.weight", (h + f"{x}_norm.weight",), Kind.REPLICATED)
            for x in "qk"
        ]
    return tuple(rules)


def dense_mlp_rules() -> tuple[Rule, ...]:
    m, h = "decoder.layers.{l}.mlp.", "model.layers.{l}.mlp."
    return (
        Rule(m + "linear_fc1.weight", (h + "gate_proj.weight", h + "up_proj.weight"), Kind.GLU),
        Rule(m + "linear_fc2.weight", (h + "down_proj.weight",), Kind.ROW),
    )
