"""Colocated, on CUDA: every trainer rank packs a bucket, and the worker on its GPU maps it."""

from __future__ import annotations

from collections import ChainMap

import torch

from vime.weight_sync import cuda_handles, wire
from vime.weight_sync.slots import Slots
from vime.weight_sync.transports import Client, Transport, from_all_ranks


class CudaIpc(Transport):
    """Rank 0 gathers the ranks' handles over `group` (gloo) and posts them to the engines."""

    every_rank_sends = True

    def __init__(
        self, clients: list[Client], timeout_s: float, rank: int, device: torch.device, group=None
    ) -> None:
        super().__init__(clients, timeout_s)
        self.rank = rank
        self.group = group
        self.slots = Slots(device)
        self.open = False  # between the first bucket of an update and its flush

    def send(self, bucket: list[wire.Named]) -> int:
        """Returns the bucket's bytes, before the engines have loaded it.

        A slot is free again when rank 0 has waited for the engines. The gather then lets the other
        ranks go on, so no rank packs into a slot that an engine still reads.
        """
        self.open = True
        entries = wire.entries_of(bucket)
        size = wire.size_of(entries)
        slot, buffer, fresh = self.slots.next(size)
        wire.pack(bucket, buffer[:size])
        device = self.slots.device
        torch.cuda.synchronize(device)
        mine = {cuda_handles.gpu_uuid(device): cuda_handles.share(buffer)} if fresh else None
        try:
            self.under_way.wait()
        finally:  # the other ranks take part in this gather even if an engine has failed
            handles = self._gather(mine)
        if self.rank == 0:
            info = {"entries": entries, "slot": slot, "handles": handles}
            self.under_way.start(lambda: self.update(info), "weight bucket")
        return size

    def skip(self) -> None:
        self.open = True
        self._gather(None)

    def flush(self) -> None:
        was_open, self.open = self.open, False
        try:
            super().flush()
        finally:
            if was_open:
                self._gather(None)  # no rank frees a buffer before the engines have read it
                self.slots.clear()

    def _gather(
        self, mine: dict[str, cuda_handles.Handle] | None
    ) -> dict[str, cuda_handles.Handle]:
        """{GPU: handle} from all ranks. They allocate new buffers at the same bucket."""
        gathered = from_all_ranks(mine, self.group)
        return dict(ChainMap(*[handles for handles in gathered if handles]))

    def close(self) -> None:
        self.slots.clear()
        torch.cuda.ipc_collect()
