"""The kernels that this process uses, chosen once by the device and the installed packages."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

from vime import platform
from vime.backends.megatron.kernels.attention_trial import missing
from vime.errors import ConfigError

VARIABLE = "VIME_KERNELS"
ATTENTION = {  # on CUDA, best first
    "fa3": "FlashAttention 3",
    "fa4": "FlashAttention 4",
    "cudnn": "cuDNN",
    "varlen": "varlen (FlashAttention 2)",
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """
    plain      Megatron's own modules
    fused      Triton kernels in place of their PyTorch twins
    attention  a key of ATTENTION, or "sdpa" without a GPU
    """

    plain: bool
    fused: bool
    attention: str

    def __str__(self) -> str:
        rest = "Megatron's own" if self.plain else "Triton" if self.fused else "PyTorch"
        attention = ATTENTION.get(self.attention, "SDPA")
        return f"attention {attention}; norm, rotary, SwiGLU, log-probs {rest}"


@cache
def chosen() -> Kernels:
    """The kernels to use. Raises ConfigError if VIME_KERNELS names one that cannot run here."""
    wish = os.environ.get(VARIABLE, "")
    plain = wish == "plain"
    asked = wish.removeprefix("attention=") if wish.startswith("attention=") else None
    if wish and not plain and asked not in ATTENTION:
        raise ConfigError(
            f"{VARIABLE}={wish} is unknown. Choose one of plain, "
            f"{', '.join(f'attention={a}' for a in ATTENTION)}, or leave it out."
        )
    if not platform.current().is_cuda:
        return Kernels(plain=plain, fused=False, attention="sdpa")
    fused = not plain and importlib.util.find_spec("triton") is not None
    return Kernels(plain=plain, fused=fused, attention=_attention(asked, plain))


def _attention(asked: str | None, plain: bool) -> str:
    if plain:
        return "varlen"
    if asked is not None:
        if problem := missing(asked):
            raise ConfigError(f"{VARIABLE}=attention={asked}: {problem}. Leave it out.")
        return asked
    return next(a for a in ATTENTION if not missing(a))
