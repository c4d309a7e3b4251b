"""Causal attention over a pack on CUDA, by the first library that has it (`choice.ATTENTION`).

fa3     FlashAttention 3, where `flash_attn_interface` is installed; Hopper
fa4     FlashAttention 4, its own package or vLLM's copy, with the CuTe DSL; Hopper and later
cudnn   cuDNN, one call for each run of sequences of one length: for few, long sequences. Packs
        of many lengths, and queries on more keys than queries, go to `varlen`
varlen  torch's, FlashAttention 2
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TRIAL_TOLERANCE = 0.02  # relative, of bfloat16 results


@dataclass(frozen=True, slots=True)
class Spans:
    """The sequences of a pack, one behind the other.

    starts  [S + 1] int32, cumulative lengths on the device
    bounds  the same numbers on the host
    """

    starts: Tensor
    bounds: Sequence[int]

    @classmethod
    def of(cls, bounds: Sequence[int], device: Any) -> Spans:
        return cls(torch.tensor(bounds, dtype=torch.int32, device=device), bounds)

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def longest(self) -> int:
        return max(self.lengths)


@cache
def missing(name: str) -> str | None:
    """Why this attention cannot run here, or None. One that is there is tried on a small pack."""
    major = torch.cuda.get_device_capability()[0]
    if name == "varlen":
        return None
    if major < 9 or (name == "fa3" and major > 9):
        return f"not for a GPU of compute capability {major}.x"
    if name == "fa3" and importlib.util.find_spec("flash_attn_interface") is None:
        return "flash_attn_interface is not installed"
    if name == "fa4" and _fa4() is None:
        return "neither flash_attn.cute nor vLLM's copy with nvidia-cutlass-dsl can be imported"
    if problem := _trial(name):
        logging.getLogger(__name__).warning("attention %s is not used: %s", name, problem)
    return problem


def _trial(name: str) -> str | None:
    """What goes wrong when it computes a small pack forward and backward, or None."""
    spans = Spans.of([0, 300, 340, 468], "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(spans.bounds[-1], heads, 128) for heads in (4, 2, 2, 4)]
    *qkv, grad = (torch.randn(s, generator=generator, device="cuda").bfloat16() for s in shapes)

    def results(kernel: str) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in qkv]
        out = attend(kernel, *leaves, spans, spans, None)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    try:
        with torch.enable_grad():
            pairs = zip(results(name), results("varlen"), strict=True)
        worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    except Exception as error:  # noqa: BLE001 - a library that fails is one that is not used
        return f"failed on a small pack: {type(error).__name__}: {error}"[:300]
    return None if worst < TRIAL_TOLERANCE else f"off by {worst:.1%} on a small pack"


def attend(
    name: str, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, scale: float | None
) -> Tensor:
    """[Q, H, Dv]: q [Q, H, D] on k [K, G, D] and v [K, G, Dv], causal within each sequence.

    A sequence may have more keys than queries: its queries are then its last positions.
    """
    if v.shape[-1] != q.shape[-1]:  # latent attention: other widths than the kernels take
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
def _fa4() -> Any:
    for module in ("flash_attn.cute.interface", "vllm.vllm_flash_attn.cute.interface"):
        try:
            return importlib.import_module(module).flash_attn_varlen_func
        except Exception:  # noqa: BLE001, S112 - an optional library in whatever state it is
            continue
    return None


def _fa4_varlen(
    q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, scale: float | None
) -> Tensor:
    out = _fa4()(
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
    if narrow < q.shape[-1]:  # latent attention; the kernel wants one width
        v = F.pad(v, (0, q.shape[-1] - narrow))
    lengths = (queries.starts, keys.starts, queries.longest, keys.longest)
    out = varlen_attn(q, k, v, *lengths, **_varlen_options(), scale=scale)
    return out[..., :narrow]


@cache
def _varlen_options() -> dict[str, Any]:
    """torch 2.10 spells causal `is_causal`, later ones `window_size`; 2.11 has no `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    return options
