"""Activations that the backward pass recomputes instead of keeping: `--recompute-modules`.

Megatron's own recomputation of norms (up to 0.19) needs TransformerEngine, saves random states and
copies the result. Norm and SwiGLU draw no random numbers, so this is simpler: a projection's input
is freed after its forward pass. Before its backward pass the input is recomputed from the tensors
that the norm or the SwiGLU keeps anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OURS = ("layernorm", "mlp_act")  # the others are Megatron's


def set_switches(config: Any, modules: Sequence[str] | None) -> None:
    """Sets a switch on the config for each of OURS: whether `modules` contains it."""
    config.recompute_norms = "layernorm" in (modules or ())
    config.recompute_mlp_act = "mlp_act" in (modules or ())


def recomputable(output: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Lets `free_until_backward` free `output`. `make` must return the same values again."""
    output.recompute = make  # type: ignore[attr-defined]
    return output


def free_until_backward(used: Tensor, result: Tensor) -> None:
    """Frees `used`, if it is recomputable, until the gradient of `result` is known.

    result  the only tensor that was computed from `used`

    The tensor is emptied and filled in place. Autograd's hooks on saved tensors would not do: they
    return weights without the attributes by which Megatron finds their gradient buffers.
    """
    make = getattr(used, "recompute", None)
    if make is None or not result.requires_grad:
        return

    def fill(_: Tensor) -> None:
        with torch.no_grad():
            used.data = make()

    result.register_hook(fill)
    used.data = used.new_empty(0)
