"""A rank's model chunks: the model inside their wrappers, and their weights by name.

A rank holds one chunk, or several under virtual pipelining. This module imports no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from vime.backends.megatron.parallel import Ranks


def unwrap(chunk: nn.Module) -> Any:
    """The GPTModel inside Megatron's DDP and Float16Module."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def named_router_biases(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The biases that DeepSeek-V3's routers add to their scores.

    Megatron updates them without a gradient. They are buffers, so `parameters()` and the optimizer
    do not include them.
    """
    return [(n, b) for n, b in model.named_buffers() if n.endswith("router.expert_bias")]


def named_weights(
    chunks: Iterable[nn.Module], ranks: Ranks, args: dict[str, Any]
) -> list[tuple[str, Tensor]]:
    """[(name in the whole model, tensor)] for every parameter and router bias of this rank.

    Layers and experts are numbered across all ranks.
    """
    local_experts = (args.get("num_experts") or 0) // ranks.expert.size
    first_expert = ranks.expert.rank * local_experts
    found = []
    for chunk in chunks:
        model = unwrap(chunk)
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        for name, tensor in [*model.named_parameters(), *named_router_biases(model)]:
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(layers[int(parts[2])])
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                parts[at] = str(first_expert + int(parts[at]))
            found.append((".".join(parts), tensor))
    return found
