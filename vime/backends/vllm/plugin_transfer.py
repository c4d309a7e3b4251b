"""The engine's side of live weight updates: runs inside vLLM's workers.

A checkpoint's tensors are loaded through vLLM's layerwise reload, never `load_weights` alone:
packed linears have given up their plain weight. On CPU two more copies need refreshing afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from vime.weight_sync import cuda_ipc, wire

# What vLLM leaves as it was loaded, on CUDA: such weights are written where they lie.
PLAIN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}


@dataclass
class NothingToJoin(WeightTransferInitInfo):
    pass


@dataclass
class GroupToJoin(WeightTransferInitInfo):
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
    path: str  # a file in shared memory that holds the packed bucket


@dataclass
class IpcBucket(Bucket):
    slot: int
    handles: dict[str, cuda_ipc.Handle]  # {GPU: handle} where the slot has a new buffer, else {}


class ReloadingEngine(WeightTransferEngine):
    """Start, any number of buckets, finish.

    A bucket that fails leaves the previous weights, but for those written in place before it: the
    trainer then marks the engine as broken, and the next update writes all of them.
    """

    in_place = False

    def start_weight_update(self) -> None:
        self.loaded: set[str] = set()
        self.in_place = self.device.type == "cuda" and keeps_plain_weights(self.model)
        self.wanted = parameter_names(self.model)
        if not self.in_place:
            initialize_layerwise_reload(self.model)
            # The model now has what it was built with, and nothing that vLLM derived from it, such
            # as the W_UK_T of latent attention: finishing makes that anew. (Nor is anything tied.)
            self.wanted &= parameter_names(self.model)

    def update_weights(self, update_info: dict) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        except BaseException:
            self._settle()
            raise

    def load(self, packed: torch.Tensor, entries: list[wire.Entry]) -> None:
        """Not in place, `packed` must stay as it is: a layer keeps views until its last tensor."""
        self.loaded |= self.model.load_weights(wire.unpack(packed, entries)) or set()

    def finish_weight_update(self) -> None:
        self._settle()
        loaded, self.loaded = self.loaded, set()  # the clean-up after a refusal has nothing to add
        missing = self.wanted - loaded
        if missing and loaded and self.model_config.quantization is None:
            raise RuntimeError(f"this update left old weights in {sorted(missing)[:8]}")

    def _settle(self) -> None:
        if self.in_place:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_for_cpu(self.model)

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM 0.25 wants a sender beside each receiver; vime's is `weight_sync.WeightSender`."""
        raise TypeError("weights for this engine are sent by vime.weight_sync.WeightSender")


class SharedMemoryEngine(ReloadingEngine):
    """Reads buckets that a trainer on the same machine wrote into shared memory."""

    init_info_cls = NothingToJoin
    update_info_cls = SharedBucket

    def init_transfer_engine(self, init_info: NothingToJoin) -> None:
        pass

    def receive_weights(self, update_info: SharedBucket) -> None:
        size = wire.size_of(update_info.entries)
        packed = torch.from_file(update_info.path, shared=False, size=size, dtype=torch.uint8)
        self.load(packed, update_info.entries)


class GlooEngine(ReloadingEngine):
    """Receives buckets that the trainer broadcasts to every worker of every engine."""

    backend = "gloo"
    init_info_cls = GroupToJoin
    update_info_cls = Bucket
    group = None

    def init_transfer_engine(self, init_info: GroupToJoin) -> None:
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.group = wire.join_group(
            self.backend,
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


class NcclEngine(GlooEngine):
    backend = "nccl"


class CudaIpcEngine(ReloadingEngine):
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
            gpu = cuda_ipc.gpu_uuid(self.device)
            if gpu not in update_info.handles:
                there = ", ".join(update_info.handles)
                raise RuntimeError(
                    f"no trainer rank is on this worker's GPU {gpu}: {there} have one"
                )
            self.slots.pop(update_info.slot, None)
            shared = cuda_ipc.open_shared(update_info.handles[gpu], self.device)
            self.slots[update_info.slot] = shared
        packed = self.slots[update_info.slot]
        self.load(packed if self.in_place else packed.clone(), update_info.entries)

    def finish_weight_update(self) -> None:
        self.slots = {}  # the trainer frees its buffers once nobody maps them
        super().finish_weight_update()


def parameter_names(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def keeps_plain_weights(model: torch.nn.Module) -> bool:
    """Whether loading can write each weight where it lies: nothing is packed, merged or quantized.

    Experts may be packed and latent attention keeps products of its weights.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method).__name__ not in PLAIN_METHODS:
            return False
        if type(module).__name__.startswith("MLA"):
            return False
    return True


def repack_for_cpu(model: torch.nn.Module) -> None:
    """Refresh the packed copies that vLLM 0.32's layerwise reload forgets on CPU.

    A tied lm_head shares its weight with the embedding, so it is not reloaded and keeps its old
    packed copy; unquantized MoE experts are packed on the first load only.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    tied = embedding is not None and getattr(head, "weight", None) is embedding.weight
    if tied and hasattr(head, "cpu_linear"):
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and hasattr(module, "w13_weight"):
            kernel.fused_experts.process_weights_after_loading(module)
