"""How one bucket of weights reaches every engine.

Each transport has its counterpart in the engines: `backends/vllm/plugin_transfer.py`, and vLLM's
own "ipc". `ranks` says which trainer ranks must call `send`: rank 0 alone, or all of them.
"""

from __future__ import annotations

import base64
import os
import pickle
import socket
import tempfile
from collections import ChainMap
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from vime.weight_sync import wire
from vime.weight_sync.together import run_together

SHARED_MEMORY = Path("/dev/shm")


class Client(Protocol):
    """The calls of one engine that a transport makes."""

    url: str

    def world_size(self) -> int: ...
    def init_weight_transfer(self, init_info: dict[str, Any]) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...


class Transport(Protocol):
    every_rank_sends: bool

    def connect(self) -> None: ...
    def send(self, bucket: list[wire.Named]) -> int: ...
    def close(self) -> None: ...


def update_all(clients: list[Client], info: dict[str, Any], timeout_s: float) -> None:
    calls = [lambda c=c: c.update_weights(info) for c in clients]
    run_together(calls, timeout_s, "weight update")


class SharedMemory:
    """Colocated, on CPU: buckets are files in shared memory, which the engines map."""

    every_rank_sends = False

    def __init__(self, clients: list[Client], timeout_s: float) -> None:
        self.clients = clients
        self.timeout_s = timeout_s

    def connect(self) -> None:
        for client in self.clients:
            client.init_weight_transfer({})

    def send(self, bucket: list[wire.Named]) -> int:
        """A file of its own per bucket: an engine may keep a view after it has answered."""
        entries = wire.entries_of(bucket)
        size = wire.size_of(entries)
        folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        fd, path = tempfile.mkstemp(prefix="vime-weights-", dir=folder)
        try:
            os.ftruncate(fd, size)
            os.close(fd)
            packed = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
            wire.pack(bucket, packed)
            update_all(self.clients, {"entries": entries, "path": path}, self.timeout_s)
        finally:
            os.unlink(path)
        return size

    def close(self) -> None:
        pass


class Broadcast:
    """Decoupled: rank 0 broadcasts to every worker of every engine, over gloo or nccl.

    The group is torch's own on both sides, so that it depends on no engine version.
    """

    every_rank_sends = False

    def __init__(
        self, clients: list[Client], timeout_s: float, backend: str, device: torch.device
    ) -> None:
        self.clients = clients
        self.timeout_s = timeout_s
        self.backend = backend
        self.device = device
        self.group = None
        self.store = None

    def connect(self) -> None:
        """Engines answer only once all have joined, so everyone joins at the same time."""
        sizes = [client.world_size() for client in self.clients]
        world_size = 1 + sum(sizes)
        host = address_towards(self.clients[0].url)
        timeout = timedelta(seconds=self.timeout_s)
        self.store = dist.TCPStore(
            host, 0, None, is_master=True, timeout=timeout, wait_for_workers=False
        )
        common = {"host": host, "port": self.store.port, "world_size": world_size}
        common["timeout_s"] = self.timeout_s
        offsets = accumulate(sizes, initial=1)  # the trainer is rank 0
        calls = [
            lambda c=client, offset=offset: c.init_weight_transfer(
                {**common, "rank_offset": offset}
            )
            for client, offset in zip(self.clients, offsets, strict=False)
        ]
        calls.append(lambda: self._join(host, world_size))
        *_, self.group = run_together(calls, self.timeout_s, f"joining over {self.backend}")

    def _join(self, host: str, world_size: int):
        return wire.join_group(
            self.backend, host, self.store.port, 0, world_size, self.timeout_s, self.store
        )

    def send(self, bucket: list[wire.Named]) -> int:
        """Engines receive while they answer /update_weights, so both run at the same time."""
        assert self.group is not None, "connect comes before send"
        entries = wire.entries_of(bucket)
        size = wire.size_of(entries)
        packed = torch.empty(size, dtype=torch.uint8, device=self.device)
        wire.pack(bucket, packed)
        calls = [lambda c=c: c.update_weights({"entries": entries}) for c in self.clients]
        calls.append(lambda: wire.broadcast(self.group, packed))
        run_together(calls, self.timeout_s, f"weight broadcast over {self.backend}")
        return size

    def close(self) -> None:
        self.group = self.store = None


class CudaIpc:
    """Colocated, on CUDA: vLLM's "ipc" backend maps each trainer rank's own copy of a tensor.

    Every rank offers handles for its GPU; rank 0 gathers them over `group` (gloo) and posts them.
    Handles travel pickled: engines accept that on loopback only, with
    VLLM_ALLOW_INSECURE_SERIALIZATION=1 in their environment.
    """

    every_rank_sends = True

    def __init__(self, clients: list[Client], timeout_s: float, rank: int, group=None) -> None:
        self.clients = clients
        self.timeout_s = timeout_s
        self.rank = rank
        self.group = group

    def connect(self) -> None:
        for client in self.clients:
            client.init_weight_transfer({})

    def send(self, bucket: list[wire.Named]) -> int:
        from torch.multiprocessing.reductions import reduce_tensor

        held = [(name, tensor.contiguous()) for name, tensor in bucket]
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handles = [{uuid: reduce_tensor(tensor)[1]} for _, tensor in held]
        torch.cuda.synchronize()
        per_rank = self._gather(handles)
        if self.rank == 0:
            merged = [dict(ChainMap(*of_one)) for of_one in zip(*per_rank, strict=True)]
            entries = wire.entries_of(held)
            info = {
                "names": [e[0] for e in entries],
                "dtype_names": [e[1] for e in entries],
                "shapes": [e[2] for e in entries],
                "ipc_handles_pickled": base64.b64encode(pickle.dumps(merged)).decode(),
            }
            update_all(self.clients, info, self.timeout_s)
        self._barrier()  # nobody frees its copy before the engines have read it
        return sum(tensor.numel() * tensor.element_size() for _, tensor in held)

    def _gather(self, handles: list[dict]) -> list[list[dict]]:
        if not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            return [handles]
        gathered: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, handles, group=self.group)
        return gathered

    def _barrier(self) -> None:
        if dist.is_initialized() and dist.get_world_size(self.group) > 1:
            dist.barrier(group=self.group)

    def close(self) -> None:
        torch.cuda.ipc_collect()


def address_towards(url: str) -> str:
    """This machine's address as the server behind `url` sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((parts.hostname, parts.port))  # sends nothing
        return s.getsockname()[0]


def make_transport(
    name: str,
    clients: list[Client],
    *,
    rank: int,
    timeout_s: float,
    device: torch.device,
    group=None,
) -> Transport:
    """shm, gloo, nccl or ipc: a platform's transport, `vime.platform.Platform`."""
    if name == "shm":
        return SharedMemory(clients, timeout_s)
    if name == "ipc":
        return CudaIpc(clients, timeout_s, rank, group)
    return Broadcast(clients, timeout_s, name, device)
