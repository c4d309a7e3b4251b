"""GPU memory of one process, seen by another on the same GPU: plain data in place of pickles.

The trainer shares a buffer once, an engine's worker opens it once; torch counts both, so that the
memory is only freed after the last one let go.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

Handle = list[Any]  # JSON: what torch needs to find the buffer, bytes as base64


def gpu_uuid(device: torch.device | int) -> str:
    """The GPU itself, whatever its number is in this process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def share(buffer: Tensor) -> Handle:
    """A handle of a whole CUDA buffer, for one worker to open."""
    _, *parts = buffer.untyped_storage()._share_cuda_()
    return [_encode(part) for part in parts]


def open_shared(handle: Handle, device: torch.device) -> Tensor:
    """The buffer behind `handle`, uint8, without a copy. Let go of it to give it back."""
    parts = [_decode(part) for part in handle]
    storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _encode(part: Any) -> Any:
    return {"base64": base64.b64encode(part).decode()} if isinstance(part, bytes) else part


def _decode(part: Any) -> Any:
    return base64.b64decode(part["base64"]) if isinstance(part, dict) else part
