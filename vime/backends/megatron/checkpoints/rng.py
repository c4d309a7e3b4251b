"""Saves and restores the random states of every rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject


def sharded_rng_state() -> Any:
    """The states of all ranks of a data-parallel group, as one object per tensor and pipeline rank.

    A collective.
    """
    mine = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return ShardedObject(
        "rng_state",
        everyone,
        (mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()),
        (mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank()),
        replica_id=dist.get_rank(group),
    )


def restore_rng_state(everyone: list[dict[str, Any]]) -> None:
    """Restores this rank's states from a `sharded_rng_state` that the same layout saved."""
    mine = everyone[dist.get_rank(mpu.get_data_parallel_group(with_context_parallel=True))]
    random.setstate(mine["random_rng_state"])
    np.random.set_state(mine["np_rng_state"])
    torch.set_rng_state(mine["torch_rng_state"])
    torch.cuda.set_rng_state(mine["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(mine["rng_tracker_states"])
