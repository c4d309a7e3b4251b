"""Decoupled: rank 0 broadcasts buckets to every worker of every engine, over gloo or NCCL."""

from __future__ import annotations

from itertools import accumulate

import torch

from vime.addresses import LOOPBACK
from vime.rendezvous import listening_store
from vime.weight_sync import wire
from vime.weight_sync.slots import Slots
from vime.weight_sync.together import run_together
from vime.weight_sync.transports import Client, Transport


class Broadcast(Transport):
    """The process group is torch's own on both sides, so it works with every vLLM release.

    host  the address of rank 0's node. Workers of every engine connect to it, so it must not be
          loopback if an engine is on another node
    """

    def __init__(
        self,
        clients: list[Client],
        timeout_s: float,
        backend: str,
        device: torch.device,
        host: str = LOOPBACK,
    ) -> None:
        super().__init__(clients, timeout_s)
        self.host = host
        self.backend = backend
        self.slots = Slots(device)
        self.group = None
        self.store = None

    def connect(self) -> None:
        """Trainer and engines join at the same time: engines answer only when all have joined."""
        sizes = [client.world_size() for client in self.clients]
        world_size = 1 + sum(sizes)
        self.store = listening_store(self.host, self.timeout_s)
        common = {
            "backend": self.backend,
            "host": self.host,
            "port": self.store.port,
            "world_size": world_size,
            "timeout_s": self.timeout_s,
        }
        offsets = accumulate(sizes, initial=1)  # the trainer is rank 0
        calls = [
            lambda c=client, offset=offset: c.init_weight_transfer(
                {**common, "rank_offset": offset}
            )
            for client, offset in zip(self.clients, offsets, strict=False)
        ]
        calls.append(lambda: wire.join_group(**common, rank=0, store=self.store))
        *_, self.group = run_together(calls, self.timeout_s, f"joining over {self.backend}")

    def send(self, bucket: list[wire.Named]) -> int:
        """Engines receive while they answer /update_weights, so both run at the same time."""
        assert self.group is not None, "connect comes before send"
        entries = wire.entries_of(bucket)
        size = wire.size_of(entries)
        packed = self.slots.next(size)[1][:size]
        wire.pack(bucket, packed)
        self.under_way.wait()
        self.under_way.start(
            lambda: self.update({"entries": entries}, lambda: wire.broadcast(self.group, packed)),
            "weight bucket",
        )
        return size

    def flush(self) -> None:
        try:
            super().flush()
        finally:
            self.slots.clear()

    def close(self) -> None:
        self.group = self.store = None
