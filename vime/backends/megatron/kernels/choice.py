"""Which kernels this process uses: decided once, by device and by what can be imported."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

from vime import platform
from vime.errors import ConfigError

VARIABLE = "VIME_KERNELS"
ATTENTION = ("fa3", "fa4", "cudnn", "varlen")  # on CUDA, best first


@dataclass(frozen=True, slots=True)
class Kernels:
    """plain: Megatron's own modules; fused: Triton's in place of PyTorch's twins."""

    plain: bool
    fused: bool
    attention: str

    def __str__(self) -> str:
        rest = "Megatron's own" if self.plain else "Triton" if self.fused else "PyTorch"
        return f"attention {_NAMES[self.attention]}; norm, rotary, SwiGLU, log-probs {rest}"


_NAMES = {
    "sdpa": "SDPA",
    "varlen": "varlen (FlashAttention 2)",
    "cudnn": "cuDNN",
    "fa3": "FlashAttention 3",
    "fa4": "FlashAttention 4",
}


@cache
def chosen() -> Kernels:
    """Raises ConfigError where VIME_KERNELS asks for what is not there."""
    wish = os.environ.get(VARIABLE, "")
    plain = wish == "plain"
    asked = wish.removeprefix("attention=") if wish.startswith("attention=") else None
    if wish and not plain and asked not in ATTENTION:
        raise ConfigError(
            f"{VARIABLE}={wish} is none of plain, {', '.join(f'attention={a}' for a in ATTENTION)}."
            " Change it, or leave it out."
        )
    if not platform.current().is_cuda:
        return Kernels(plain=plain, fused=False, attention="sdpa")
    fused = not plain and importlib.util.find_spec("triton") is not None
    return Kernels(plain=plain, fused=fused, attention=_attention(asked, plain))


def _attention(asked: str | None, plain: bool) -> str:
    from vime.backends.megatron.kernels.attention import missing

    if plain:
        return "varlen"
    if asked is not None:
        if problem := missing(asked):
            raise ConfigError(f"{VARIABLE}=attention={asked}: {problem}. Leave it out.")
        return asked
    return next(a for a in ATTENTION if not missing(a))
