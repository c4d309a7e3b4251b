"""The critic's last layer: one float32 value for each token in place of logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from vime import platform


class ValueHead(nn.Module):
    """[T, 1, hidden] -> [T, 1, 1], called as GPTModel calls its output layer.

    The weight starts at zero, so every value is 0 before the first training step. Under sequence
    parallelism each tensor parallel rank values its share of the tokens and gathers the others'
    values. The mark on the weight tells Megatron to sum its gradient over these ranks.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        device = torch.cuda.current_device() if platform.current().is_cuda else "cpu"
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.weight.is_value_head = True  # type: ignore[attr-defined]  # see `build_optimizer`
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        value = F.linear(hidden.float(), self.weight)
        if self.sequence_parallel:
            value = gather_from_sequence_parallel_region(value, tensor_parallel_output_grad=False)
        return value, None
