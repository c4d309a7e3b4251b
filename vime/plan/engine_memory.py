"""Memory of an engine's GPU: the weights, and a KV cache that never runs out."""

from __future__ import annotations

from vime.config import Config
from vime.plan.parts import Part
from vime.plan.shape import Shape
from vime.plan.tokens import longest_sample, responses_per_engine


def engine_parts(cfg: Config, shape: Shape, num_bytes: int) -> list[Part]:
    """Parts of one engine GPU: weights, and the KV cache of all responses at full length.

    num_bytes  bytes of one weight or cached value
    """
    tp = cfg.cluster.gpus_per_engine
    running, length = responses_per_engine(cfg), longest_sample(cfg)
    if shape.latent is not None:
        values, counted = shape.latent.kv_rank + shape.latent.rope, "latent"
    else:
        values = 2 * max(1, shape.kv_heads / tp) * shape.head_dim
        counted = "2 x KV heads x head size"
    per_token = shape.layers * values * num_bytes
    return [
        Part("weights", shape.parameters * num_bytes / tp, "all parameters x b / engine's GPUs"),
        Part(
            "KV cache, full",
            per_token * running * length,
            f"layers x {counted} x b = {per_token:,.0f} a token x {running} "
            f"responses x {length:,} tokens",
        ),
    ]
