"""How a bucket of new weights reaches a vLLM worker: one receiver for each transport.

The trainer's side is in `vime/weight_sync`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from vime.addresses import LOOPBACK
from vime.backends.vllm.plugin_reload import ReloadingReceiver
from vime.weight_sync import cuda_handles, wire
from vime.weight_sync.choice import NODE


@dataclass
class NothingToJoin(WeightTransferInitInfo):
    pass


@dataclass
class GroupToJoin(WeightTransferInitInfo):
    backend: str  # gloo or nccl
    host: str
    port: int
    rank_offset: int  # of this engine's first worker; the trainer is rank 0
    world_size: int
    timeout_s: float


@dataclass
class Bucket(WeightTransferUpdateInfo):
    entries: list[wire.Entry]


@dataclass
class SharedBucket(Bucket):
    paths: dict[str, str]  # {node: a file in its shared memory that holds the packed bucket}


@dataclass
class IpcBucket(Bucket):
    slot: int
    handles: dict[str, cuda_handles.Handle]  # {GPU: handle} if the slot has a new buffer, else {}


class SharedMemoryReceiver(ReloadingReceiver):
    """Reads buckets that a trainer rank on the same node wrote into shared memory."""

    init_info_cls = NothingToJoin
    update_info_cls = SharedBucket

    def init_transfer_engine(self, init_info: NothingToJoin) -> None:
        pass

    def receive_weights(self, update_info: SharedBucket) -> None:
        node = os.environ.get(NODE, LOOPBACK)
        if node not in update_info.paths:
            there = ", ".join(update_info.paths)
            raise RuntimeError(
                f"no trainer rank is on this worker's node {node}; trainer ranks are on {there}"
            )
        size, path = wire.size_of(update_info.entries), update_info.paths[node]
        packed = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
        self.load(packed, update_info.entries)


class BroadcastReceiver(ReloadingReceiver):
    """Receives buckets that the trainer broadcasts to every worker of every engine."""

    init_info_cls = GroupToJoin
    update_info_cls = Bucket
    group = None

    def init_transfer_engine(self, init_info: GroupToJoin) -> None:
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.group = wire.join_group(
            init_info.backend,
            init_info.host,
            init_info.port,
            init_info.rank_offset + worker,
            init_info.world_size,
            init_info.timeout_s,
        )

    def receive_weights(self, update_info: Bucket) -> None:
        if self.group is None:
            raise RuntimeError("no trainer has connected: init_weight_transfer_engine comes first")
        size = wire.size_of(update_info.entries)
        packed = torch.empty(size, dtype=torch.uint8, device=self.device)
        wire.broadcast(self.group, packed)
        self.load(packed, update_info.entries)

    def shutdown(self) -> None:
        self.group = None


class CudaIpcReceiver(ReloadingReceiver):
    """Maps buckets that the trainer's rank on this worker's GPU packed."""

    init_info_cls = NothingToJoin
    update_info_cls = IpcBucket

    def init_transfer_engine(self, init_info: NothingToJoin) -> None:
        pass

    def start_weight_update(self) -> None:
        self.slots: dict[int, torch.Tensor] = {}
        super().start_weight_update()

    def receive_weights(self, update_info: IpcBucket) -> None:
        if update_info.handles:
            gpu = cuda_handles.gpu_uuid(self.device)
            if gpu not in update_info.handles:
                there = ", ".join(update_info.handles)
                raise RuntimeError(
                    f"no trainer rank is on this worker's GPU {gpu}; trainer ranks are on {there}"
                )
            self.slots.pop(update_info.slot, None)
            shared = cuda_handles.open_shared(update_info.handles[gpu], self.device)
            self.slots[update_info.slot] = shared
        packed = self.slots[update_info.slot]
        self.load(packed if self.in_place else packed.clone(), update_info.entries)

    def finish_weight_update(self) -> None:
        self.slots = {}  # the trainer's buffers are freed when no process maps them
        super().finish_weight_update()
