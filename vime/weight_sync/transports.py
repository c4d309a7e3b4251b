"""How one bucket of weights reaches every engine.

Each transport has its counterpart in the engines: `backends/vllm/plugin_transfer.py`.
`every_rank_sends` says which trainer ranks must call `send` and `flush`: all, or rank 0 alone.
"""

from __future__ import annotations

import os
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

from vime.weight_sync import cuda_ipc, wire
from vime.weight_sync.together import InFlight, run_together

SHARED_MEMORY = Path("/dev/shm")


class Client(Protocol):
    """The calls of one engine that a transport makes."""

    url: str

    def world_size(self) -> int: ...
    def init_weight_transfer(self, init_info: dict[str, Any]) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...


class Transport(Protocol):
    every_rank_sends: bool
    under_way: InFlight  # what must end before engines get a bucket: their pause, the one before

    def connect(self) -> None: ...

    def send(self, bucket: list[wire.Named]) -> int:
        """May return before the engines have it: the caller may then gather the next bucket."""
        ...

    def skip(self) -> None:
        """In place of `send`, for a bucket that no engine will get since the update has failed."""
        ...

    def flush(self) -> None:
        """After the last bucket: returns when every engine has loaded every bucket. Safe twice."""
        ...

    def close(self) -> None: ...


class Slots:
    """Two buffers in turn: one is filled while the engines read the other.

    They live for one update only: on a shared GPU the engines' caches need the room.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[int, torch.Tensor] = {}
        self.turn = 0

    def next(self, size: int) -> tuple[int, torch.Tensor, bool]:
        """(slot, its buffer of at least `size` bytes, whether the buffer is a new one)."""
        slot, self.turn = self.turn, 1 - self.turn
        fresh = slot not in self.buffers or self.buffers[slot].numel() < size
        if fresh:
            self.buffers.pop(slot, None)  # before its successor takes as much again
            self.buffers[slot] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return slot, self.buffers[slot], fresh

    def clear(self) -> None:
        self.buffers.clear()
        self.turn = 0


def update_all(clients: list[Client], info: dict[str, Any], timeout_s: float) -> None:
    calls = [lambda c=c: c.update_weights(info) for c in clients]
    run_together(calls, timeout_s, "weight update")


class SharedMemory:
    """Colocated, on CPU: buckets are files in shared memory, which the engines map."""

    every_rank_sends = False

    def __init__(self, clients: list[Client], timeout_s: float) -> None:
        self.clients = clients
        self.timeout_s = timeout_s
        self.under_way = InFlight()

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
            self.under_way.wait()
            update_all(self.clients, {"entries": entries, "path": path}, self.timeout_s)
        finally:
            os.unlink(path)
        return size

    def skip(self) -> None:
        pass

    def flush(self) -> None:
        self.under_way.wait()

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
        self.slots = Slots(device)
        self.under_way = InFlight()

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
        packed = self.slots.next(size)[1][:size]
        wire.pack(bucket, packed)
        self.under_way.wait()
        calls = [lambda c=c: c.update_weights({"entries": entries}) for c in self.clients]
        calls.append(lambda: wire.broadcast(self.group, packed))
        self.under_way.start(
            lambda: run_together(calls, self.timeout_s, "weight update"), "weight bucket"
        )
        return size

    def skip(self) -> None:
        pass

    def flush(self) -> None:
        try:
            self.under_way.wait()
        finally:
            self.slots.clear()

    def close(self) -> None:
        self.group = self.store = None


class CudaIpc:
    """Colocated, on CUDA: every trainer rank packs a bucket, and the worker on its GPU maps it.

    Rank 0 gathers the ranks' handles over `group` (gloo) and posts them to the engines.
    """

    every_rank_sends = True

    def __init__(
        self, clients: list[Client], timeout_s: float, rank: int, device: torch.device, group=None
    ) -> None:
        self.clients = clients
        self.timeout_s = timeout_s
        self.rank = rank
        self.group = group
        self.slots = Slots(device)
        self.under_way = InFlight()
        self.open = False  # between the first bucket of an update and its flush

    def connect(self) -> None:
        for client in self.clients:
            client.init_weight_transfer({})

    def send(self, bucket: list[wire.Named]) -> int:
        """A rank packs into a slot only after rank 0 has seen the engines done with it: rank 0
        waits for the bucket before, then takes part in the gather that lets the others go on."""
        self.open = True
        entries = wire.entries_of(bucket)
        size = wire.size_of(entries)
        slot, buffer, fresh = self.slots.next(size)
        wire.pack(bucket, buffer[:size])
        torch.cuda.synchronize(self.slots.device)
        mine = {cuda_ipc.gpu_uuid(self.slots.device): cuda_ipc.share(buffer)} if fresh else None
        try:
            self.under_way.wait()
        finally:  # the other ranks take part in this gather, whatever an engine said
            handles = self._gather(mine)
        if self.rank == 0:
            info = {"entries": entries, "slot": slot, "handles": handles}
            self.under_way.start(
                lambda: update_all(self.clients, info, self.timeout_s), "weight bucket"
            )
        return size

    def skip(self) -> None:
        self.open = True
        self._gather(None)

    def flush(self) -> None:
        was_open, self.open = self.open, False
        try:
            self.under_way.wait()
        finally:
            if was_open:
                self._gather(None)  # nobody frees a buffer before the engines have read it
                self.slots.clear()

    def _gather(self, mine: dict[str, cuda_ipc.Handle] | None) -> dict[str, cuda_ipc.Handle]:
        """{GPU: handle} of every rank; ranks have new buffers at the same buckets."""
        if not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            return mine or {}
        gathered: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, mine, group=self.group)
        return dict(ChainMap(*[handles for handles in gathered if handles]))

    def close(self) -> None:
        self.slots.clear()
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
        return CudaIpc(clients, timeout_s, rank, device, group)
    return Broadcast(clients, timeout_s, name, device)
