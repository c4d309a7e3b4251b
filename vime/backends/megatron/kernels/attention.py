"""Causal attention over a pack on CUDA, by the first library that works here (`choice.ATTENTION`).

fa3     FlashAttention 3, if `flash_attn_interface` is installed; Hopper
fa4     FlashAttention 4, its own package or vLLM's copy with the CuTe DSL; Hopper and later
cudnn   cuDNN, one call for each run of sequences of equal length: good for few, long sequences.
        Packs with many lengths, or with more keys than queries, use `varlen`
varlen  torch's varlen_attn, which is FlashAttention 2
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vime.backends.megatron.kernels.spans import Spans


def attend(
    name: str, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, scale: float | None
) -> Tensor:
    """[Q, H, Dv]: q [Q, H, D] attends to k [K, G, D], v [K, G, Dv], causal within each sequence.

    If a sequence has more keys than queries, the queries are its last positions.
    """
    if v.shape[-1] != q.shape[-1]:  # latent attention: the other kernels need one width
        return _varlen(q, k, v, queries, keys, scale)
    if name == "fa3":
        return _fa3(q, k, v, queries, keys, scale)
    if name == "fa4":
        return _fa4_varlen(q, k, v, queries, keys, scale)
    if name == "cudnn" and queries is keys:
        from vime.backends.megatron.kernels import cudnn

        if len(cudnn.runs_of(keys.bounds)) <= cudnn.MAX_CALLS:
            return cudnn.attend(q, k, v, keys.bounds, scale)
    return _varlen(q, k, v, queries, keys, scale)


def _fa3(
    q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, scale: float | None
) -> Tensor:
    flash = importlib.import_module("flash_attn_interface").flash_attn_varlen_func
    lengths = (queries.starts, keys.starts, queries.longest, keys.longest)
    out = flash(q, k, v, *lengths, softmax_scale=scale, causal=True)
    return out[0] if isinstance(out, tuple) else out


@cache
def fa4() -> Any:
    """FlashAttention 4, or None if no copy of it can be imported."""
    for module in ("flash_attn.cute.interface", "vllm.vllm_flash_attn.cute.interface"):
        try:
            return importlib.import_module(module).flash_attn_varlen_func
        except Exception:  # noqa: BLE001, S112 - an optional library, which may be broken
            continue
    return None


def _fa4_varlen(
    q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, scale: float | None
) -> Tensor:
    out = fa4()(
        q,
        k,
        v,
        cu_seqlens_q=queries.starts,
        cu_seqlens_k=keys.starts,
        max_seqlen_q=queries.longest,
        max_seqlen_k=keys.longest,
        softmax_scale=scale,
        causal=True,
    )
    return out[0] if isinstance(out, tuple) else out


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    narrow = v.shape[-1]
    if narrow < q.shape[-1]:  # latent attention; the kernel needs one width
        v = F.pad(v, (0, q.shape[-1] - narrow))
    lengths = (queries.starts, keys.starts, queries.longest, keys.longest)
    out = varlen_attn(q, k, v, *lengths, **_varlen_options(), scale=scale)
    return out[..., :narrow]


@cache
def _varlen_options() -> dict[str, Any]:
    """torch 2.10 has `is_causal`, later versions have `window_size`. 2.11 has no `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    return options
