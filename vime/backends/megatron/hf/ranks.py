"""Where this rank stands in the groups that a weight is spread over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Place:
    """One axis of the layout: this rank's position and its process group."""

    rank: int
    size: int
    group: Any


@dataclass(frozen=True, slots=True)
class Ranks:
    tensor: Place
    expert_tensor: Place
    expert: Place
    pipeline: Place

    @classmethod
    def current(cls) -> Ranks:
        """From Megatron's groups, which must be initialised."""
        from megatron.core import parallel_state as mpu

        def place(group: Any) -> Place:
            return Place(dist.get_rank(group), dist.get_world_size(group), group)

        return cls(
            tensor=place(mpu.get_tensor_model_parallel_group()),
            expert_tensor=place(mpu.get_expert_tensor_parallel_group()),
            expert=place(mpu.get_expert_model_parallel_group()),
            pipeline=place(mpu.get_pipeline_model_parallel_group()),
        )
