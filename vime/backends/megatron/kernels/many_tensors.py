"""Operations on lists of tensors in a few kernels. torch's functions replace those of apex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def l2_norm(
    _: int, __: Any, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False, *___: Any
) -> tuple[Tensor, None]:
    """([1] float32, None): the norm of all elements of all tensors. Does not wait for the device.

    The arguments are the same as in apex's `multi_tensor_l2norm`.
    """
    assert not per_tensor
    norms = torch._foreach_norm([t for tensors in lists for t in tensors])
    return torch.linalg.vector_norm(torch.stack(norms).float()).view(1), None


def scale(_: int, __: Any, lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Sets each tensor of the second list to its twin in the first list times `factor`."""
    source, target = (list(tensors) for tensors in lists)
    if any(a is not b for a, b in zip(source, target, strict=True)):
        torch._foreach_copy_(target, source)
    if factor != 1.0 and target:
        torch._foreach_mul_(target, factor)
