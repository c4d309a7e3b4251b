"""Moves a rank's weights, gradients and optimizer state off the GPU and back, in place.

The storage behind the tensors moves, so every tensor, view and bucket that Megatron holds stays
valid and later sees the same bytes. Weights and optimizer state wait in pinned memory. It is
allocated once, in blocks, because pinning takes about a second per GiB and longer for many small
pieces. Gradients are zeroed before the next step, so their memory is freed without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_BYTES = 1 << 30  # torch rounds pinned memory up to a power of two
ALIGNMENT = 512


@dataclass(slots=True)
class _Away:
    """A storage whose GPU memory is freed.

    held  the bytes in pinned memory; None if the content was dropped
    """

    storage: torch.UntypedStorage
    num_bytes: int
    held: Tensor | None


class Offload:
    """Moves the caller's tensors. Both `offload` and `onload` may be called twice."""

    def __init__(self) -> None:
        self.away: dict[int, _Away] = {}
        self.pinned: dict[int, Tensor] = {}
        self.block = torch.empty(0, dtype=torch.uint8)  # the unused rest of the newest block

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.away.values())

    @torch.no_grad()
    def offload(
        self,
        kept: Iterable[Tensor],
        dropped: Iterable[Tensor] = (),
        staying: Iterable[Tensor] = (),
    ) -> None:
        """Frees the GPU memory behind the tensors, except memory that `staying` uses too.

        The content of `dropped` is lost.
        """
        settled = {t.untyped_storage()._cdata for t in staying} | self.away.keys()
        leaving: dict[int, _Away] = {}
        for tensors, keep in ((kept, True), (dropped, False)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if not tensor.is_cuda or size == 0 or key in settled:
                    continue
                settled.add(key)
                held = self._pinned(key, size) if keep else None
                if held is not None:
                    held.copy_(_bytes_of(storage), non_blocking=True)
                leaving[key] = _Away(storage, size, held)
        torch.cuda.synchronize()
        for part in leaving.values():
            part.storage.resize_(0)
        self.away |= leaving
        free_cached_memory()

    @torch.no_grad()
    def onload(self) -> None:
        """Allocates the GPU memory again and copies the kept content into it."""
        for part in self.away.values():
            part.storage.resize_(part.num_bytes)
            if part.held is not None:
                _bytes_of(part.storage).copy_(part.held, non_blocking=True)
        torch.cuda.synchronize()
        self.away.clear()

    def _pinned(self, key: int, size: int) -> Tensor:
        held = self.pinned.get(key)
        if held is None or held.numel() != size:
            held = self.pinned[key] = self._allocate(size)
        return held

    def _allocate(self, size: int) -> Tensor:
        room = -(-size // ALIGNMENT) * ALIGNMENT
        if room > BLOCK_BYTES // 2:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        if room > self.block.numel():
            self.block = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
        held, self.block = self.block[:size], self.block[room:]
        return held


def free_cached_memory() -> None:
    """Returns torch's cached blocks, and buffers that engines no longer use, to the GPU."""
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def weights_of(chunks: Sequence[nn.Module]) -> Iterator[Tensor]:
    for chunk in chunks:
        yield from (parameter.data for parameter in chunk.parameters())


def gradients_of(chunks: Sequence[nn.Module]) -> Iterator[Tensor]:
    """The buffers of Megatron's DistributedDataParallel, dense and expert."""
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data


def optimizer_state_of(optimizer: Any) -> Iterator[Tensor]:
    """Main weights and moments of every optimizer that `optimizer` chains."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def set_memory_limit(margin_bytes: int) -> None:
    """Lets this process grow until only the margin (--train-memory-margin-bytes) is free.

    At this limit torch first returns its cached blocks, and only then reports that memory ran out.
    """
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.memory_reserved() + free - margin_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, limit / total)))
