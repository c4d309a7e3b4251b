"""Handles of GPU memory: a process on the same GPU opens the buffer that a handle names.

A handle is plain data, so nothing is pickled. The trainer shares a buffer once and an engine's
worker opens it once. torch counts both, and frees the memory when both have released it.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

Handle = list[Any]  # JSON: torch's parts of a handle, bytes as base64


def gpu_uuid(device: torch.device | int) -> str:
    """The GPU's own id, which is the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def share(buffer: Tensor) -> Handle:
    """A handle of a whole CUDA buffer, for one worker to open."""
    _, *parts = buffer.untyped_storage()._share_cuda_()
    return [_encode(part) for part in parts]


def open_shared(handle: Handle, device: torch.device) -> Tensor:
    """The buffer behind `handle`, uint8, without a copy. Delete the tensor to release it."""
    parts = [_decode(part) for part in handle]
    storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _encode(part: Any) -> Any:
    return {"base64": base64.b64encode(part).decode()} if isinstance(part, bytes) else part


def _decode(part: Any) -> Any:
    return base64.b64decode(part["base64"]) if isinstance(part, dict) else part
