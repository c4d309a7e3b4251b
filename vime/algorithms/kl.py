"""Estimates of the KL divergence to a reference policy, from the sampled tokens.

Sources: http://joschu.net/blog/kl-approx.html, and arXiv:2512.02556 for `unbiased_kl`. The keys of
`KL_TYPES` are the choices of --kl-loss-type; the command line reads them without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vime.algorithms.ratios import LARGEST_LOG_RATIO, ratio_of

if TYPE_CHECKING:
    from torch import Tensor


def k1(diff_T: Tensor) -> Tensor:
    """d: unbiased; it can be negative."""
    return diff_T


def k2(diff_T: Tensor) -> Tensor:
    """d**2 / 2: biased.

    Over tokens that the policy itself sampled, its mean gradient is the gradient of the KL.
    """
    return diff_T.square() / 2


def k3(diff_T: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative. Below d = -20 it stays at its value there."""
    diff_T = diff_T.clamp(min=-LARGEST_LOG_RATIO)
    return ratio_of(-diff_T) - 1 + diff_T


def low_var_kl(diff_T: Tensor) -> Tensor:
    """k3, clamped to -10 .. 10."""
    return k3(diff_T).clamp(-10, 10)


KL_TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "low_var_kl": low_var_kl,
}


def kl_estimate(logp_T: Tensor, ref_logp_T: Tensor, kind: str) -> Tensor:
    """KL(policy || reference), one estimate per token [T].

    logp_T      [T] policy, may carry grad
    ref_logp_T  [T] reference, no grad
    kind        a key of `KL_TYPES`, applied to d = logp - ref_logp
    """
    return KL_TYPES[kind](logp_T - ref_logp_T)


def unbiased_kl(logp_T: Tensor, old_logp_T: Tensor, ref_logp_T: Tensor, kind: str) -> Tensor:
    """`kl_estimate` times the ratio exp(logp - old_logp), with the gradient of both, [T].

    The old policy sampled the tokens. The ratio makes it an estimate for the policy being trained.
    With k3, its mean gradient is the gradient of that policy's KL (DeepSeek-V3.2,
    arXiv:2512.02556).
    """
    return ratio_of(logp_T - old_logp_T) * kl_estimate(logp_T, ref_logp_T, kind)
