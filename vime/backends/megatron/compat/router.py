"""Corrections of megatron-core's routers for micro-batches with padding (0.16 to 0.19)."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from vime.patches import Patch


def _mask_of_tokens() -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    stock = TopKRouter._apply_expert_bias

    @functools.wraps(stock)
    def by_token(self: Any, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        stock(self, routing_map, None if padding_mask is None else padding_mask.reshape(-1, 1))

    TopKRouter._apply_expert_bias = by_token


def _nothing_but_padding() -> None:
    from megatron.core.transformer.moe import router

    stock = router.get_tokens_per_expert_and_token_count

    @functools.wraps(stock)
    def at_least_one(*args: Any, **kwargs: Any) -> tuple:
        per_expert, local, total = stock(*args, **kwargs)
        return per_expert, local, total.clamp(min=1) if isinstance(total, Tensor) else total

    router.get_tokens_per_expert_and_token_count = at_least_one


_ROUTER = "megatron.core.transformer.moe.router"

ROUTER_PATCHES = (
    Patch(
        "mask of tokens",
        "the count behind the routers' biases combines a [tokens, experts] map and a [tokens] mask",
        "TopKRouter._apply_expert_bias gives the mask a second axis",
        (f"{_ROUTER}.TopKRouter._apply_expert_bias",),
        _mask_of_tokens,
    ),
    Patch(
        "nothing but padding",
        "the load-balancing loss divides by the number of tokens without padding, which is 0 in a "
        "micro-batch that only fills up a rank: its gradient is NaN",
        "the load-balancing loss of a micro-batch of padding is 0",
        (f"{_ROUTER}.get_tokens_per_expert_and_token_count",),
        _nothing_but_padding,
    ),
)
