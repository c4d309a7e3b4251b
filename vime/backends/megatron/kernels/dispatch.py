"""Calls the Triton kernels if they are chosen, otherwise their PyTorch twins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vime.backends.megatron.kernels import reference
from vime.backends.megatron.kernels.choice import chosen


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis (arXiv:1910.07467), any leading shape."""
    if chosen().fused:
        from vime.backends.megatron.kernels import norm

        return norm.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """[..., F] of [..., 2F]: silu of the first half times the second (arXiv:2002.05202)."""
    if chosen().fused:
        from vime.backends.megatron.kernels import activation

        return activation.swiglu(x)
    return reference.swiglu(x)


def split_qkv(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one projection, normed and rotated: see `qkv.split_qkv`."""
    if chosen().fused:
        from vime.backends.megatron.kernels import qkv

        return qkv.split_qkv(*args)
    return reference.split_qkv(*args)
