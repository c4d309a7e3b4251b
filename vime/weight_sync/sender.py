"""One weight update, from the trainer's tensors to a version that every engine acknowledges."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from vime import platform
from vime.addresses import LOOPBACK
from vime.config import Config
from vime.errors import EngineError
from vime.observe import Timers, spans
from vime.weight_sync import wire
from vime.weight_sync.broadcast import Broadcast
from vime.weight_sync.choice import engines_sleep, transport_name
from vime.weight_sync.cuda_ipc import CudaIpc
from vime.weight_sync.engines import Engines
from vime.weight_sync.shared_memory import SharedMemory
from vime.weight_sync.transports import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """The cost of one update.

    seconds  from pause to resume: how long requests stood still
    phases   {"pause": s, "send": s, "finish": s, "resume": s}; "send" includes the export of the
             weights and the pause, during which the first bucket is gathered and packed
    """

    version: int
    seconds: float = 0.0
    bytes: int = 0
    tensors: int = 0
    buckets: int = 0
    phases: dict[str, float] = field(default_factory=dict)


class WeightSender:
    """Every trainer rank has a sender and calls `send`. Only rank 0 talks to the engines."""

    def __init__(
        self,
        clients: list[Any],
        transport: Transport,
        *,
        rank: int,
        bucket_bytes: int,
        timeout_s: float,
        compare_checksums: bool = False,
        engines_asleep: bool = False,
        keep_kv: bool = False,
    ) -> None:
        self.engines = Engines(
            clients,
            timeout_s,
            asleep=engines_asleep,
            check_checksums=compare_checksums,
            keep_kv=keep_kv,
        )
        self.transport = transport
        self.rank = rank
        self.bucket_bytes = bucket_bytes

    def connect(self) -> None:
        """All ranks call this before the first `send`, and again after engines were replaced."""
        if not self.engines.clients:
            return
        self.transport.meet()
        if self.rank == 0:
            self.transport.connect()

    def close(self) -> None:
        self.transport.close()

    def send(self, named_tensors: Iterable[wire.Named], version: int) -> SyncReport:
        """Put the weights into every engine and give them this version.

        named_tensors  (HF name, full tensor), the same on all ranks. Exporting them is collective,
                       so every rank reads them to the end, also after an engine has failed

        Raises EngineError if an engine fails, does not answer in time, acknowledges another
        version or, with --check-weight-update-equal, received wrong bytes.
        """
        if not self.engines.clients:
            return SyncReport(version=version)
        buckets = wire.buckets(named_tensors, self.bucket_bytes)
        if self.rank != 0:
            self._update_on_other_ranks(buckets)
            return SyncReport(version=version)
        try:
            return self._update_on_rank_0(buckets, version)
        except BaseException:  # the other ranks are still exporting and sending
            for _ in buckets:
                self.transport.skip()
            with contextlib.suppress(EngineError):
                self.transport.flush()
            raise

    def _update_on_other_ranks(self, buckets: Iterable[list[wire.Named]]) -> None:
        """All ranks but 0 help to export the buckets, and send them if the transport asks."""
        for bucket in buckets:
            if self.transport.every_rank_sends:
                self.transport.send(bucket)
        if self.transport.every_rank_sends:
            self.transport.flush()

    def _update_on_rank_0(self, buckets: Iterable[list[wire.Named]], version: int) -> SyncReport:
        """Rank 0 sends the buckets and leads the engines through the update."""
        timers, began, span_began = Timers(), time.monotonic(), spans.now()
        num_bytes = num_tensors = num_buckets = 0
        checksums: dict[str, str] = {}

        def freeze() -> None:
            with timers("pause"):
                self.engines.freeze()

        try:
            with timers("send"):
                # vLLM sleeps 20 ms in every pause. The first bucket is packed meanwhile.
                self.transport.under_way.start(freeze, "pause")
                for bucket in buckets:
                    num_bytes += self.transport.send(bucket)
                    num_tensors += len(bucket)
                    num_buckets += 1
                    if self.engines.check_checksums:
                        checksums |= {name: wire.checksum(tensor) for name, tensor in bucket}
                self.transport.flush()
            with timers("finish"):
                self.engines.finish()
                self.engines.acknowledge(version, checksums)
        except BaseException:
            with contextlib.suppress(Exception):
                self.transport.under_way.wait()  # a pause that ends later would outlive the resume
            self.engines.abandon()
            raise
        finally:
            with timers("resume"):
                self.engines.resume()
            for i in range(len(self.engines.clients)):
                spans.add("update weights", span_began, f"engine {i}", version=version)
        return SyncReport(
            version=version,
            seconds=time.monotonic() - began,
            bytes=num_bytes,
            tensors=num_tensors,
            buckets=num_buckets,
            phases=timers.seconds,
        )


def make_sender(
    cfg: Config,
    clients: list[Any],
    rank: int,
    *,
    device: torch.device | None = None,
    group=None,
    host: str = LOOPBACK,
) -> WeightSender:
    """The sender for this configuration and machine.

    clients  one `EngineClient` per engine, on every rank. Nothing is sent if there are no clients,
             or with --debug-train-only
    device   where rank 0 packs buckets for a broadcast
    group    a gloo group of all trainer ranks (default: torch's default group)
    host     the address of this rank's node
    """
    on = platform.current()
    engines = [] if cfg.debug.no_engines else list(clients)
    timeout_s = cfg.engine.weight_transfer_timeout_s
    device = device or on.device()
    transport: Transport
    match transport_name(cfg, on):
        case "shm":
            transport = SharedMemory(engines, timeout_s, rank=rank, host=host, group=group)
        case "ipc":
            transport = CudaIpc(engines, timeout_s, rank, device, group)
        case backend:
            transport = Broadcast(engines, timeout_s, backend, device, host)
    return WeightSender(
        engines,
        transport,
        rank=rank,
        bucket_bytes=cfg.engine.update_weight_buffer_size,
        timeout_s=timeout_s,
        compare_checksums=cfg.engine.check_weight_update_equal,
        engines_asleep=engines_sleep(cfg, on),
        keep_kv=cfg.rollout.keeps_kv_cache,
    )
