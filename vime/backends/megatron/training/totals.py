"""Adds up, over all ranks, the sums that each rank computed over its tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

Sums = dict[str, Tensor]  # name -> sum over this rank's tokens, a scalar


def on_last_stage() -> bool:
    return mpu.is_pipeline_last_stage(ignore_virtual=True)


def totals(sums: Sums, device: torch.device) -> dict[str, float]:
    """The sums of all ranks that hold tokens, equal on every rank. A collective.

    On the last pipeline stage, the ranks of one tensor-parallel group hold the same tokens, so only
    one of these ranks counts. Ranks of other stages may give {}.
    """
    counts = mpu.get_tensor_model_parallel_rank() == 0 and on_last_stage()
    names = _names_on_all_ranks(sums)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    values = [sums[name].double() if counts and name in sums else zero for name in names]
    vector = torch.stack([zero, *values])
    dist.all_reduce(vector)
    return dict(zip(names, vector.tolist()[1:], strict=True))


def step_means(sums: Sums, device: torch.device) -> tuple[float, dict[str, float]]:
    """(loss, {name: mean}) of an optimizer step. A collective.

    sums  the loss, the sum of the weights, and weighted sums of everything else
    """
    found = totals(sums, device)
    loss, weight = found.pop("loss", 0.0), found.pop("weight", 0.0)
    return loss, {f"train/{name}": total / weight for name, total in found.items() if weight}


def _names_on_all_ranks(sums: Sums) -> list[str]:
    """The same names in the same order on every rank."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, list(sums))
    return sorted({name for names in found for name in names})
