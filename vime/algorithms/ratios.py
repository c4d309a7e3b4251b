"""Ratios of two policies' probabilities, from the difference of their log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The exp of it is finite in float32 and bfloat16, and so are its square and its product with any
# sensible loss.
LARGEST_LOG_RATIO = 20.0


def ratio_of(log_ratio_T: Tensor) -> Tensor:
    """exp(log_ratio) [T], for log-ratios above 20 exp(20) with gradient 0.

    The bound acts before exp: the gradient of an exp that overflowed is NaN, even where a later
    clamp or maximum multiplies it by 0.
    """
    return log_ratio_T.clamp(max=LARGEST_LOG_RATIO).exp()
