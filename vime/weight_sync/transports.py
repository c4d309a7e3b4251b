"""How a bucket of weights reaches every engine: the base of all transports, and shared memory.

Each transport has a counterpart inside the engines: `backends/vllm/plugin_receivers.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from vime.weight_sync import wire
from vime.weight_sync.together import InFlight, run_together

SHARED_MEMORY = Path("/dev/shm")


class Client(Protocol):
    """The calls to one engine that a transport makes."""

    url: str

    def world_size(self) -> int: ...
    def init_weight_transfer(self, init_info: dict[str, Any]) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...


class Transport:
    """`connect` once. Then, in each update, `send` every bucket and `flush`.

    every_rank_sends  whether all trainer ranks call `send` and `flush`, or rank 0 alone
    under_way         what must end before engines get a bucket: their pause, or the bucket before
    """

    every_rank_sends = False

    def __init__(self, clients: list[Client], timeout_s: float) -> None:
        self.clients = clients
        self.timeout_s = timeout_s
        self.under_way = InFlight()

    def connect(self) -> None:
        for client in self.clients:
            client.init_weight_transfer({})

    def send(self, bucket: list[wire.Named]) -> int:
        """Returns the bucket's bytes, maybe before the engines have loaded it."""
        raise NotImplementedError

    def skip(self) -> None:
        """Called in place of `send` after the update has failed: no engine gets this bucket."""

    def flush(self) -> None:
        """Returns when every engine has loaded every bucket. May be called twice."""
        self.under_way.wait()

    def close(self) -> None:
        pass

    def update(self, info: dict[str, Any], *meanwhile: Callable[[], Any]) -> None:
        """Let every engine load a bucket while the other calls run. Returns when all are done."""
        loads = [partial(client.update_weights, info) for client in self.clients]
        run_together([*loads, *meanwhile], self.timeout_s, "weight update")


class SharedMemory(Transport):
    """Colocated, on CPU: buckets are files in shared memory, which the engines map."""

    def send(self, bucket: list[wire.Named]) -> int:
        """Each bucket has a file of its own: an engine may keep views after it has answered."""
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
            self.update({"entries": entries, "path": path})
        finally:
            os.unlink(path)
        return size
