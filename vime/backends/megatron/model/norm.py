"""RMSNorm for Megatron's layer specs. The stock torch norm refuses sequence parallelism."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vime import platform
from vime.backends.megatron.kernels import rms_norm
from vime.backends.megatron.model.recompute import remakeable


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467), any leading shape.

    Under sequence parallelism each tensor-parallel rank sees part of the sequence, so Megatron must
    sum the weight's gradient over them: the mark on the weight asks for it.
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
        """None gives the weight, for a kernel that norms on its way."""
        if x is None:
            return self.weight
        y = rms_norm(x, self.weight, self.eps)
        if self.again and torch.is_grad_enabled():
            remakeable(y, partial(rms_norm, x, self.weight, self.eps))
        return y
