"""Marks on weights, which tell Megatron over which ranks to sum gradients and norms."""

from __future__ import annotations

from megatron.core import tensor_parallel
from torch import nn

# Modules whose weight is split over tensor parallel ranks, and the axis of the split.
_SPLIT: dict[type[nn.Module], int] = {
    tensor_parallel.VocabParallelEmbedding: 0,
    tensor_parallel.ColumnParallelLinear: 0,
    tensor_parallel.RowParallelLinear: 1,
}


def mark_shards(chunk: nn.Module) -> None:
    """Marks the weights that are shards.

    Megatron sets these marks when it initialises weights, and vime skips initialisation. Without
    the marks the gradient norm would count only the shards of tensor rank 0.
    """
    for module in chunk.modules():
        weight = getattr(module, "weight", None)
        dim = next((d for kind, d in _SPLIT.items() if isinstance(module, kind)), None)
        if dim is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)


def mark_experts(chunk: nn.Module) -> None:
    """Marks experts, which do not see the same tokens as the dense layers of their tensor rank.

    Megatron marks experts under expert parallelism only. Without it, and with tensor parallel sizes
    that differ, an expert's gradient would lack the tokens of the other tensor ranks. With the same
    mark in every layout the optimizer's state has one shape, so that it can be resharded.
    """
    for name, parameter in chunk.named_parameters():
        if ".local_experts." in name:
            parameter.allreduce = False
