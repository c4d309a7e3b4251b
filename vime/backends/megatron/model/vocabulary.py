"""The padded vocabulary: its size, and probability 0 for the padding."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn


def padded_vocab_size(args: dict[str, Any], tp: int) -> int:
    """Rows of the embedding: the vocabulary, padded so that all tensor ranks have equally many.

    Each rank's rows are a multiple of --make-vocab-size-divisible-by. Megatron's default is 128;
    here it is 1, because padding costs logits.
    """
    multiple = args.get("make_vocab_size_divisible_by", 1) * tp
    return -(-args["vocab_size"] // multiple) * multiple


def hide_padding(chunk: GPTModel, vocab_size: int) -> None:
    """Gives padded entries probability 0, so that they do not change a log-probability."""
    if not chunk.post_process or chunk.vocab_size == vocab_size:
        return
    per_rank = chunk.vocab_size // mpu.get_tensor_model_parallel_world_size()
    real = max(0, min(per_rank, vocab_size - per_rank * mpu.get_tensor_model_parallel_rank()))
    if real == per_rank:
        return

    def fill(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        mask = logits.new_zeros(per_rank)
        mask[real:] = -1e30  # finite: 0 * log(0) must stay 0 in an entropy
        return logits + mask, bias

    chunk.output_layer.register_forward_hook(fill)
