"""RMSNorm for Megatron's layer specs. Megatron's own torch norm refuses sequence parallelism."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from torch import Tensor, nn

from vime import platform
from vime.backends.megatron.kernels.dispatch import rms_norm
from vime.backends.megatron.model.recompute import recomputable


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467), any leading shape.

    Under sequence parallelism each tensor parallel rank sees part of the sequence. The mark on the
    weight tells Megatron to sum its gradient over these ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        here = platform.current()
        device = torch.cuda.current_device() if here.is_cuda else "cpu"
        self.eps = eps
        self.again = getattr(config, "recompute_norms", False)
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor | None) -> Tensor:
        """The norm of x. If x is None: the weight, for a kernel that also computes the norm."""
        if x is None:
            return self.weight
        y = rms_norm(x, self.weight, self.eps)
        if self.again and torch.is_grad_enabled():
            recomputable(y, partial(rms_norm, x, self.weight, self.eps))
        return y


class NormedRowParallelLinear(RowParallelLinear):
    """A projection back into the residual stream, with an RMSNorm of its output."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias
