"""What DeepSeek-V3's routers add to their scores: moved by Megatron, without a gradient."""

from __future__ import annotations

from torch import Tensor, nn


def named_router_biases(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers, so that neither `parameters` nor an optimizer has them."""
    return [(n, b) for n, b in model.named_buffers() if n.endswith("router.expert_bias")]
