"""Memory per GPU by component, estimated from `config.json`, each figure beside its formula.

Names in the formulas: b bytes of a weight, h hidden size, L layers of this pipeline stage, T tokens
of a micro-batch on one GPU, V vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vime.config import Config
from vime.config.rules import hf_config

# Bytes that a transformer layer keeps for its backward, in units of b x h per token: 17 without
# attention scores, which flash attention does not keep (arXiv:2205.05198, section 4). Of these, 12
# are split by tensor parallelism and 5 by sequence parallelism.
KEPT_SPLIT, KEPT_WHOLE = 12, 5


@dataclass(frozen=True, slots=True)
class Part:
    """One component: bytes on one GPU and how they were counted."""

    name: str
    num_bytes: float
    formula: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What the estimate needs of a model; parameters are counted, not bytes."""

    hidden: int
    layers: int
    vocab: int
    kv_heads: int
    head_dim: int
    embedding: int  # of the input, and of the output if untied
    dense_per_layer: int  # all but routed experts
    experts_per_layer: int

    @property
    def parameters(self) -> int:
        return self.embedding + self.layers * (self.dense_per_layer + self.experts_per_layer)

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From a decoder's `config.json`. Raises KeyError where that lacks a usual key."""
        h, layers, vocab = (config[k] for k in ("hidden_size", "num_hidden_layers", "vocab_size"))
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or h // heads
        attention = 2 * h * heads * head_dim + 2 * h * kv_heads * head_dim
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        expert_ffn = config.get("moe_intermediate_size") or config.get("intermediate_size", 0)
        mlp = h * experts if experts else 3 * h * config["intermediate_size"]
        return cls(
            hidden=h,
            layers=layers,
            vocab=vocab,
            kv_heads=kv_heads,
            head_dim=head_dim,
            embedding=vocab * h * (1 if config.get("tie_word_embeddings") else 2),
            dense_per_layer=attention + mlp + 2 * h,
            experts_per_layer=experts * 3 * h * expert_ffn,
        )


def trainer_parts(cfg: Config, shape: Shape, num_bytes: int) -> list[Part]:
    """Memory of one trainer GPU, on the fullest pipeline stage. num_bytes: of one weight."""
    layout, tp = cfg.parallel, cfg.parallel.tp
    layers = -(-shape.layers // layout.pp)
    dense = (shape.embedding + layers * shape.dense_per_layer) / tp
    local = dense + layers * shape.experts_per_layer / (layout.ep * layout.etp)
    tokens = tokens_per_micro_batch(cfg)
    full = layout.recompute_granularity == "full"

    gradient = 4 if cfg.optimizer.accumulate_fp32 else num_bytes
    state = 8 if cfg.optimizer.optimizer == "adam" else 0
    state += 4 if num_bytes < 4 else 0
    shards = cfg.dp * layout.cp if layout.use_distributed_optimizer else 1
    kept = KEPT_SPLIT / tp + KEPT_WHOLE / (tp if layout.sequence_parallel else 1)
    per_token = num_bytes * shape.hidden
    if full:
        whole = 1 / (tp if layout.sequence_parallel else 1)
        activations = tokens * per_token * (layers * whole + kept)
        counted = "T x b x h x (L inputs + 1 layer of 12/t + 5)"
    else:
        activations = tokens * per_token * layers * kept
        counted = "T x b x h x L x (12/t + 5), 5/t under --sequence-parallel"
    return [
        Part("weights", local * num_bytes, f"P = {local:,.0f} parameters here x b = {num_bytes}"),
        Part("gradients", local * gradient, f"P x {gradient}"),
        Part("optimizer", local * state / shards, f"P x {state} / {shards} shards"),
        Part("activations", activations, f"{counted}, T = {tokens:,}"),
        Part(
            "logits",
            tokens * shape.vocab / tp * (num_bytes + 8),
            f"T x V / t x (b + 4 float32 + 4 gradient), V = {shape.vocab:,}",
        ),
    ]


def engine_parts(cfg: Config, shape: Shape, num_bytes: int) -> list[Part]:
    """Memory of one engine GPU: weights, and the KV cache of all responses at full length."""
    tp = cfg.cluster.gpus_per_engine
    heads = max(1, shape.kv_heads / tp)
    per_token = 2 * shape.layers * heads * shape.head_dim * num_bytes
    running = responses_per_engine(cfg)
    length = cfg.rollout.max_context_len or (
        (cfg.rollout.max_prompt_len or 0) + cfg.rollout.max_response_len
    )
    return [
        Part("weights", shape.parameters * num_bytes / tp, "all parameters x b / engine's GPUs"),
        Part(
            "KV cache, full",
            per_token * running * length,
            f"2 x layers x KV heads x head size x b = {per_token:,.0f} a token x {running} "
            f"responses x {length:,} tokens",
        ),
    ]


def tokens_per_micro_batch(cfg: Config) -> int:
    """T, on one GPU. A longer sample is a pack of its own and exceeds it."""
    if cfg.batch.dynamic and cfg.batch.max_tokens_per_gpu is not None:
        return cfg.batch.max_tokens_per_gpu
    length = cfg.rollout.max_context_len or (
        (cfg.rollout.max_prompt_len or 0) + cfg.rollout.max_response_len
    )
    return -(-cfg.batch.micro_batch_size * length // cfg.parallel.cp)


def responses_per_engine(cfg: Config) -> int:
    """Requests that one engine holds at a time, at most."""
    prompts = max(cfg.batch.prompts, cfg.rollout.over_sampling or 0)
    shared = -(-prompts * cfg.batch.samples_per_prompt // max(1, cfg.cluster.num_engines))
    return min(cfg.rollout.concurrency, shared)


def shape_of(cfg: Config) -> Shape | None:
    """None for an architecture whose `config.json` names its sizes otherwise."""
    try:
        return Shape.of(hf_config(cfg))
    except KeyError:
        return None
