"""The format that trainer and engine share: the memory layout of a bucket, and checksums.

Both sides import this file: the trainer's transports and the code that runs inside vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 64  # bytes; a view of any dtype can start at a multiple

Entry = tuple[str, str, list[int]]  # name, dtype's name, shape: plain JSON
Named = tuple[str, Tensor]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _num_bytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel * dtype.itemsize


def entries_of(bucket: list[Named]) -> list[Entry]:
    return [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in bucket]


def size_of(entries: list[Entry]) -> int:
    """Bytes of the packed bucket."""
    return sum(_aligned(_num_bytes(getattr(torch, d), shape)) for _, d, shape in entries)


def pack(bucket: list[Named], out: Tensor) -> None:
    """Copy the tensors one after another into `out`, uint8 [size_of(entries_of(bucket))]."""
    for (_, view), (_, tensor) in zip(unpack(out, entries_of(bucket)), bucket, strict=True):
        view.copy_(tensor)


def unpack(packed: Tensor, entries: list[Entry]) -> Iterator[Named]:
    """Views into `packed`: the inverse of `pack`, without a copy."""
    offset = 0
    for name, dtype_name, shape in entries:
        dtype = getattr(torch, dtype_name)
        num_bytes = _num_bytes(dtype, shape)
        yield name, packed[offset : offset + num_bytes].view(dtype).view(shape)
        offset += _aligned(num_bytes)


def buckets(named: Iterable[Named], max_bytes: int) -> Iterator[list[Named]]:
    """Group tensors in order, up to `max_bytes` each. A larger tensor gets its own bucket."""
    bucket: list[Named] = []
    held = 0
    for name, tensor in named:
        size = _aligned(tensor.numel() * tensor.element_size())
        if bucket and held + size > max_bytes:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor.detach()))
        held += size
    if bucket:
        yield bucket


def checksum(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype}{list(data.shape)}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def join_group(
    backend: str, host: str, port: int, rank: int, world_size: int, timeout_s: float, store=None
):
    """A process group beside torch's default one, in which rank 0 broadcasts weights.

    backend  "gloo" or "nccl"
    store    rank 0's store, which listens on `port`; None on the other ranks, which connect to it
    """
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        store = dist.TCPStore(host, port, None, is_master=False, timeout=timeout)
    prefixed = dist.PrefixStore("vime_weights", store)
    if backend == "gloo":
        return dist.ProcessGroupGloo(prefixed, rank, world_size, timeout)
    return dist.ProcessGroupNCCL(prefixed, rank, world_size, timeout)


def broadcast(group, buffer: Tensor) -> None:
    """Send `buffer` from rank 0 to all others. Returns when it has arrived here."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([buffer], options).wait()
