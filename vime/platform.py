"""CUDA or CPU, chosen once: the device, its collectives and its default type.

Besides this file only rendezvous.py, the layer spec, the transports and offloading name cuda, nccl
or gloo.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A machine with CUDA has one of these files (Linux, Tegra, WSL). Without them there is no need to
# import torch, which takes seconds.
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvmap", "/dev/dxg")


_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
LONGEST_SOCKET_PATH = 107  # bytes that Linux allows for the path of a socket


@dataclass(frozen=True, slots=True)
class Platform:
    device_type: str  # "cuda" or "cpu"
    collectives: str  # torch.distributed backend
    default_dtype: str
    ray_resource: str  # Ray's name for the resource of one slot in a placement group
    slots_name: str  # for messages

    @property
    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    def device(self, local_rank: int = 0) -> torch.device:
        import torch

        return torch.device("cuda", local_rank) if self.is_cuda else torch.device("cpu")

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype of `--dtype`: "auto", "float32" or "bfloat16"."""
        import torch

        return getattr(torch, self.dtype_name(name))

    def dtype_name(self, name: str) -> str:
        """The same as a word. Unlike `dtype`, it does not import torch, which takes seconds."""
        return self.default_dtype if name == "auto" else name

    def dtype_bytes(self, name: str) -> int:
        return _DTYPE_BYTES[self.dtype_name(name)]


CUDA = Platform("cuda", "nccl", "bfloat16", "GPU", "GPUs")
CPU = Platform("cpu", "gloo", "float32", "CPU", "CPU slots")


_BY_NAME = {platform.device_type: platform for platform in (CUDA, CPU)}
_CHOICE = "VIME_DEVICE"  # an environment variable, so child processes make the same choice


def current() -> Platform:
    """The platform of this run, or of this machine if nothing was chosen."""
    if chosen := os.environ.get(_CHOICE):
        return _BY_NAME[chosen]
    return CUDA if has_cuda() else CPU


def has_cuda() -> bool:
    """Whether this process can use a GPU."""
    if not any(Path(file).exists() for file in _DEVICE_FILES):
        return False
    import torch

    return torch.cuda.is_available()


def named(device: str) -> Platform:
    """The platform of "cuda" or "cpu"."""
    return _BY_NAME[device]


def choose(platform: Platform) -> None:
    """Choose for this process and its children. A cluster's driver may have no GPU itself."""
    os.environ[_CHOICE] = platform.device_type


def chosen(platform: Platform) -> dict[str, str]:
    """The environment of a process that shall make this choice."""
    return {_CHOICE: platform.device_type}
