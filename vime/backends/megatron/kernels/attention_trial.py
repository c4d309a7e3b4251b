"""Which attention libraries work here. An installed library must first compute a small pack."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from vime.backends.megatron.kernels.attention import attend, fa4
from vime.backends.megatron.kernels.spans import Spans

TRIAL_TOLERANCE = 0.02  # relative error of bfloat16 results


@cache
def missing(name: str) -> str | None:
    """Why this attention cannot run here; None if it can."""
    major = torch.cuda.get_device_capability()[0]
    if name == "varlen":
        return None
    if major < 9 or (name == "fa3" and major > 9):
        return f"not for a GPU of compute capability {major}.x"
    if name == "fa3" and importlib.util.find_spec("flash_attn_interface") is None:
        return "flash_attn_interface is not installed"
    if name == "fa4" and fa4() is None:
        return "neither flash_attn.cute nor vLLM's copy with nvidia-cutlass-dsl can be imported"
    if problem := _trial(name):
        logging.getLogger(__name__).warning("attention %s is not used: %s", name, problem)
    return problem


def _trial(name: str) -> str | None:
    """The problem with the forward or backward pass of a small pack; None if both are right."""
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
    except Exception as error:  # noqa: BLE001 - a library that fails is not used
        return f"failed on a small pack: {type(error).__name__}: {error}"[:300]
    return None if worst < TRIAL_TOLERANCE else f"off by {worst:.1%} on a small pack"
