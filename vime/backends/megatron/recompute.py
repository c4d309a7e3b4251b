"""Activations that are made again in the backward pass instead of kept: `--recompute-modules`.

Megatron's own way for norms (up to 0.19) needs TransformerEngine, saves random states and copies
the result. Norm and SwiGLU draw nothing: what a projection would keep of its input is replaced by
how to make it, from what the norm or the SwiGLU keeps anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

OURS = ("layernorm", "mlp_act")  # the others are Megatron's


def note(config: Any, modules: Sequence[str] | None) -> None:
    """Has the config say which of OURS are asked for."""
    config.recompute_norms = "layernorm" in (modules or ())
    config.recompute_mlp_act = "mlp_act" in (modules or ())


def remakeable(output: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """`output`, with a note for `remade`. `make` must give the same values."""
    output.remake = make  # type: ignore[attr-defined]
    return output


@contextmanager
def remade(output: Tensor) -> Iterator[None]:
    """Inside, autograd keeps of `output`, if it is remakeable, only how to make it."""
    make = getattr(output, "remake", None)
    if make is None:
        yield
        return
    where, shape = output.data_ptr(), output.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == where and saved.shape == shape else saved

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return make()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
