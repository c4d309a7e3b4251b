"""One weight update, from the trainer's tensors to an acknowledged version in every engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from vime import platform
from vime.config import Config
from vime.errors import EngineError
from vime.weight_sync import wire
from vime.weight_sync.together import run_together
from vime.weight_sync.transports import Transport, make_transport

BROKEN = -1  # the version of an engine that an update left half done


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one update took.

    seconds  pause to resume, as the engines' requests feel it
    phases   {"pause": s, "send": s, "finish": s, "resume": s}; send includes export and the pause,
             during which the first bucket is gathered and packed
    """

    version: int
    seconds: float = 0.0
    bytes: int = 0
    tensors: int = 0
    buckets: int = 0
    phases: dict[str, float] = field(default_factory=dict)


class WeightSender:
    """Every trainer rank builds one and calls `send`; rank 0 alone talks to the engines.

    engines_asleep  their KV caches sleep while weights come: vLLM schedules nothing until it has
                    woken those, so there is nothing to pause, and to resume would be too early
    """

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
    ) -> None:
        self.clients = clients
        self.transport = transport
        self.rank = rank
        self.bucket_bytes = bucket_bytes
        self.timeout_s = timeout_s
        self.compare_checksums = compare_checksums
        self.engines_asleep = engines_asleep
        self.checksums: dict[str, str] = {}

    def connect(self) -> None:
        """Once, before the first `send`, and again after engines were replaced."""
        if self.rank == 0 and self.clients:
            self.transport.connect()

    def close(self) -> None:
        self.transport.close()

    def send(self, named_tensors: Iterable[wire.Named], version: int) -> SyncReport:
        """Put the weights into every engine and give them this version.

        named_tensors  (HF name, full tensor), the same on all ranks; exporting it is collective,
                       so it is read to its end on every rank, also when an engine fails

        Raises EngineError when an engine fails, does not answer in time, acknowledges another
        version or, with --check-weight-update-equal, received other bytes.
        """
        if not self.clients:
            return SyncReport(version=version)
        stream = wire.buckets(named_tensors, self.bucket_bytes)
        if self.rank != 0:
            for bucket in stream:
                if self.transport.every_rank_sends:
                    self.transport.send(bucket)
            if self.transport.every_rank_sends:
                self.transport.flush()
            return SyncReport(version=version)
        try:
            return self._send(stream, version)
        except BaseException:  # the other ranks are still exporting and sending
            for _ in stream:
                self.transport.skip()
            with contextlib.suppress(EngineError):
                self.transport.flush()
            raise

    def _send(self, stream: Iterable[list[wire.Named]], version: int) -> SyncReport:
        clock = PhaseClock()
        began = time.monotonic()
        num_bytes = num_tensors = num_buckets = 0
        self.checksums = {}
        try:
            with clock.phase("send"):
                # vLLM sleeps 20 ms in every pause; the first bucket is made ready meanwhile.
                self.transport.under_way.start(lambda: self._freeze(clock), "pause")
                for bucket in stream:
                    num_bytes += self.transport.send(bucket)
                    num_tensors += len(bucket)
                    num_buckets += 1
                    if self.compare_checksums:
                        self.checksums |= {n: wire.checksum(t) for n, t in bucket}
                self.transport.flush()
            with clock.phase("finish"):
                self._all(lambda c: c.finish_weight_update(), "end of the weight update")
                self._acknowledge(version)
        except BaseException:
            with contextlib.suppress(Exception):
                self.transport.under_way.wait()  # a pause that ends later would outlive the resume
            self._leave_no_update_open()
            raise
        finally:
            with clock.phase("resume"):
                self._resume_whatever_happened()
        return SyncReport(
            version=version,
            seconds=time.monotonic() - began,
            bytes=num_bytes,
            tensors=num_tensors,
            buckets=num_buckets,
            phases=clock.seconds,
        )

    def _freeze(self, clock: PhaseClock) -> None:
        """Every engine stops where it is and expects new weights."""
        with clock.phase("pause"):
            if not self.engines_asleep:
                self._all(lambda c: c.pause("keep"), "pause")
            if self.compare_checksums:
                self._all(lambda c: c.record_checksums(), "checksums")
            self._all(lambda c: c.start_weight_update(), "start of the weight update")

    def _acknowledge(self, version: int) -> None:
        """Every worker of every engine must say the version, and what it computed must be gone."""

        def stamp(client: Any) -> None:
            client.reset_prefix_cache()
            held = client.set_weight_version(version)
            if not held or any(v != version for v in held):
                raise EngineError(
                    f"engine {client.url} holds weight versions {held} after an update to {version}"
                )
            if self.compare_checksums:
                for worker, received in enumerate(client.checksums()):
                    self._compare(f"worker {worker} of engine {client.url}", received)

        self._all(stamp, "acknowledgement of the weight version")

    def _compare(self, who: str, received: dict[str, str]) -> None:
        sent = self.checksums
        wrong = sorted(n for n in sent.keys() | received.keys() if sent.get(n) != received.get(n))
        if wrong:
            raise EngineError(
                f"--check-weight-update-equal: {who} received other bytes than were sent for "
                f"{len(wrong)} of {len(sent)} tensors, among them {', '.join(wrong[:4])}"
            )

    def _leave_no_update_open(self) -> None:
        """An engine in the middle of an update cannot run: end it, and mark what it holds."""

        def end(client: Any) -> None:
            with contextlib.suppress(EngineError):  # refused when the engine has ended it itself
                client.finish_weight_update()
            with contextlib.suppress(EngineError):
                client.set_weight_version(BROKEN)

        with contextlib.suppress(EngineError):
            self._all(end, "clean-up after a failed weight update")

    def _resume_whatever_happened(self) -> None:
        """A paused engine would leave every later request hanging."""
        if self.engines_asleep:
            return

        def resume(client: Any) -> EngineError | None:
            try:
                client.resume()
            except EngineError as error:
                return error
            return None

        errors = [e for e in self._all(resume, "resume") if e is not None]
        if errors:
            raise errors[0]

    def _all(self, call: Callable[[Any], Any], what: str) -> list[Any]:
        return run_together([lambda c=c: call(c) for c in self.clients], self.timeout_s, what)


class PhaseClock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str):
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - began


def make_sender(
    cfg: Config,
    clients: list[Any],
    rank: int,
    *,
    device: torch.device | None = None,
    group=None,
) -> WeightSender:
    """The sender for this configuration and machine.

    clients  one `EngineClient` per engine, on every rank (only rank 0 calls them); none, or
             --debug-train-only: nothing is sent
    device   where rank 0 packs buckets for a broadcast
    group    a gloo group of all trainer ranks, for CUDA IPC (default: torch's default group)
    """
    on = platform.current()
    name = on.colocated_transport if cfg.cluster.colocate else on.decoupled_transport
    engines = [] if cfg.debug.no_engines else list(clients)
    timeout_s = cfg.engine.weight_transfer_timeout_s
    transport = make_transport(
        name,
        engines,
        rank=rank,
        timeout_s=timeout_s,
        device=device or on.device(),
        group=group,
    )
    return WeightSender(
        engines,
        transport,
        rank=rank,
        bucket_bytes=cfg.engine.update_weight_buffer_size,
        timeout_s=timeout_s,
        compare_checksums=cfg.engine.check_weight_update_equal,
        engines_asleep=on.is_cuda and cfg.cluster.offload_rollout,
    )
