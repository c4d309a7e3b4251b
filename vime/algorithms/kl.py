"""Estimates of the KL divergence to a reference policy from the tokens that were sampled."""

from __future__ import annotations

from torch import Tensor

KL_TYPES = ("k1", "k2", "k3", "low_var_kl")


def unbiased_kl(logp_T: Tensor, old_logp_T: Tensor, ref_logp_T: Tensor, kind: str) -> Tensor:
    """`kl_estimate` times the ratio exp(logp - old_logp), with the gradient of both, [T].

    The tokens come from the old policy; the ratio makes the estimate, and with k3 its gradient,
    that of the policy being trained (DeepSeek-V3.2, arXiv:2512.02556).
    """
    return (logp_T - old_logp_T).exp() * kl_estimate(logp_T, ref_logp_T, kind)


def kl_estimate(logp_T: Tensor, ref_logp_T: Tensor, kind: str) -> Tensor:
    """KL(policy || reference), one estimate per token (http://joschu.net/blog/kl-approx.html).

    logp_T      [T] policy, may carry grad
    ref_logp_T  [T] reference, no grad
    kind        k1: d; k2: d**2 / 2; k3: exp(-d) - 1 + d; low_var_kl: k3 within -10 and 10,
                where d = logp - ref_logp
    """
    diff_T = logp_T - ref_logp_T
    if kind == "k1":
        return diff_T
    if kind == "k2":
        return diff_T.square() / 2
    k3_T = (-diff_T).exp() - 1 + diff_T
    if kind == "k3":
        return k3_T
    assert kind == "low_var_kl", kind
    return k3_T.clamp(-10, 10)
