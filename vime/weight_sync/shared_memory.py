"""Colocated, on CPU: buckets are files in shared memory, one on each node, which engines map."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from vime.addresses import LOOPBACK, is_loopback
from vime.errors import EngineError
from vime.weight_sync import wire
from vime.weight_sync.transports import Client, Transport, from_all_ranks

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Copy:
    """One node's copy of a bucket: the path of its file, or the reason why there is no file."""

    path: str = ""
    problem: str = ""


class SharedMemory(Transport):
    """The lowest rank of each node writes a bucket's file there. Rank 0 posts {host: path}.

    With one node, rank 0 does all of it and the ranks exchange nothing.

    host   this node's address, the same for all of its ranks and engines
    group  a gloo group of all trainer ranks (default: torch's default group)
    """

    def __init__(
        self,
        clients: list[Client],
        timeout_s: float,
        *,
        rank: int = 0,
        host: str = LOOPBACK,
        group=None,
    ) -> None:
        super().__init__(clients, timeout_s)
        self.rank = rank
        self.host = host
        self.group = group
        self.writes = rank == 0
        self.open = False  # between the first bucket of an update over several nodes and its flush
        self.files: list[str] = []  # of this rank, which engines may still have to map
        self._too_small: set[str] = set()  # folders that had no room for a bucket

    def meet(self) -> None:
        if is_loopback(self.host):  # the run has one node
            return
        hosts = from_all_ranks(self.host, self.group)
        self.writes = hosts.index(self.host) == self.rank
        self.every_rank_sends = len(set(hosts)) > 1

    def send(self, bucket: list[wire.Named]) -> int:
        """Each bucket has its own file, because an engine may keep views after it has answered.

        Returns the bucket's bytes. On rank 0, all engines have loaded the bucket by then. Other
        ranks delete their file when they meet rank 0 again: at the next bucket, or in `flush`.
        """
        self.open = self.every_rank_sends
        entries = wire.entries_of(bucket)
        size = wire.size_of(entries)
        earlier, self.files = self.files, []
        copies = {self.host: self._write(bucket, size)} if self.writes else {}
        try:
            try:
                self.under_way.wait()
            finally:  # the other ranks take part in this exchange even if an engine has failed
                copies = self._exchanged(copies, earlier)
            if self.rank == 0:
                self.update({"entries": entries, "paths": _paths(copies)})
        finally:
            if self.rank == 0:
                _delete(self.files)
        return size

    def skip(self) -> None:
        if self.every_rank_sends:
            self.open = True
            self._exchanged({}, self.files)

    def flush(self) -> None:
        was_open, self.open = self.open, False
        try:
            super().flush()
        finally:
            if was_open:
                self._exchanged({}, self.files)

    def close(self) -> None:
        _delete(self.files)

    def _exchanged(self, copies: dict[str, Copy], earlier: list[str]) -> dict[str, Copy]:
        """The copies of all nodes. Deletes the files of earlier buckets, which are loaded now."""
        try:
            if not self.every_rank_sends:
                return copies
            return {
                host: copy
                for found in from_all_ranks(copies, self.group)
                for host, copy in found.items()
            }
        except BaseException:
            _delete(self.files)
            raise
        finally:
            _delete(earlier)

    def _write(self, bucket: list[wire.Named], size: int) -> Copy:
        """This node's copy of a bucket. No error is raised here: other ranks would wait for us."""
        try:
            path = self._reserved(size)
            packed = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
            wire.pack(bucket, packed)
        except EngineError as error:
            return Copy(problem=str(error))
        except (OSError, RuntimeError) as error:
            return Copy(problem=f"weights cannot be shared: {type(error).__name__}: {error}")
        return Copy(path)

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
                self.files.append(path)
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


def _paths(copies: dict[str, Copy]) -> dict[str, str]:
    """{host: path}. Raises EngineError if a node has no copy."""
    for host, copy in copies.items():
        if copy.problem:
            where = "" if is_loopback(host) else f"node {host}: "
            raise EngineError(where + copy.problem)
    return {host: copy.path for host, copy in copies.items()}


def _delete(files: list[str]) -> None:
    while files:
        with suppress(FileNotFoundError):
            os.unlink(files.pop())
