"""CUDA or CPU, chosen once: the device, its collectives and its default type.

Besides this file only the layer spec, the transports and offloading name cuda, nccl or gloo.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Platform:
    device_type: str  # "cuda" or "cpu"
    collectives: str  # torch.distributed backend
    default_dtype: torch.dtype
    ray_resource: str  # Ray's name for the resource of one slot in a placement group

    @property
    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    def device(self, local_rank: int = 0) -> torch.device:
        return torch.device("cuda", local_rank) if self.is_cuda else torch.device("cpu")

    def dtype(self, name: str) -> torch.dtype:
        """`--dtype` resolved: "auto", "float32" or "bfloat16"."""
        return self.default_dtype if name == "auto" else getattr(torch, name)


CUDA = Platform("cuda", "nccl", torch.bfloat16, "GPU")
CPU = Platform("cpu", "gloo", torch.float32, "CPU")


def current() -> Platform:
    return CUDA if torch.cuda.is_available() else CPU
