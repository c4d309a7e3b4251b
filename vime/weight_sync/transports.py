"""How a bucket of weights reaches every engine: the base of all transports, and shared memory.

Each transport has a counterpart inside the engines: `backends/vllm/plugin_receivers.py`.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from vime.errors import EngineError
from vime.weight_sync import wire
from vime.weight_sync.together import InFlight, run_together

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


class Client(Protocol):
    """The calls to one engine that a transport makes."""

    url: str

    def world_size(self) -> int: ...
    def init_weight_transfer(self, init_info: dict[str, Any]) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...


class Transport:
    """Call `connect` once. In each update, call `send` for every bucket, then `flush`.

    every_rank_sends  whether all trainer ranks call `send` and `flush`, or rank 0 alone
    under_way         the call that must end before engines get the next bucket: their pause, or
                      the previous bucket
    """

    every_rank_sends = False

    def __init__(self, clients: list[Client], timeout_s: float) -> None:
        self.clients = clients
        self.timeout_s = timeout_s
        self.under_way = InFlight()
        self._too_small: set[str] = set()  # folders that had no room for a bucket

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
        """Each bucket has its own file, because an engine may keep views after it has answered."""
        entries = wire.entries_of(bucket)
        size = wire.size_of(entries)
        path = self._reserved(size)
        try:
            packed = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
            wire.pack(bucket, packed)
            self.under_way.wait()
            self.update({"entries": entries, "path": path})
        finally:
            os.unlink(path)
        return size

    def _reserved(self, size: int) -> str:
        """A new file with `size` reserved bytes. Without the reservation, Linux kills a process
        that writes to full shared memory.

        The file lies in shared memory. If shared memory is too small, as often in a container, the
        file lies in the temporary folder. Raises EngineError if both are too small.
        """
        folders = [str(SHARED_MEMORY)] if SHARED_MEMORY.is_dir() else []
        folders.append(tempfile.gettempdir())
        for folder in folders:
            fd, path = tempfile.mkstemp(prefix="vime-weights-", dir=folder)
            try:
                os.posix_fallocate(fd, 0, size)
                return path
            except OSError as error:
                os.unlink(path)
                if error.errno != errno.ENOSPC:
                    raise
                self._say_once(folder, size)
            finally:
                os.close(fd)
        raise EngineError(
            f"neither {' nor '.join(folders)} has room for {size:,} bytes of weights. Give the "
            "container more shared memory (docker run --shm-size 2g), set TMPDIR to a larger disk, "
            "or lower --update-weight-buffer-size."
        )

    def _say_once(self, folder: str, size: int) -> None:
        if folder not in self._too_small:
            self._too_small.add(folder)
            logger.warning("%s has no room for %s bytes of weights", folder, f"{size:,}")
