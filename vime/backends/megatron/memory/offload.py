"""A rank's weights, gradients and optimizer state leave the GPU and come back, in place.

What moves is the memory behind the tensors: every tensor, view and bucket that Megatron holds stays
valid and sees the same bytes again. Weights and optimizer state wait in pinned memory, which is
allocated once, in blocks: pinning costs about a second a GiB, and more for many small pieces.
Gradients are zeroed at the next step, so theirs is only given up.
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
    """A storage without memory: how much it needs, and its bytes unless nobody wants them back."""

    storage: torch.UntypedStorage
    num_bytes: int
    held: Tensor | None


class Offload:
    """`leave` and `come_back` for tensors named by the caller; both are safe to call twice."""

    def __init__(self) -> None:
        self.away: dict[int, _Away] = {}
        self.pinned: dict[int, Tensor] = {}
        self.block = torch.empty(0, dtype=torch.uint8)  # what is left of the newest one

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.away.values())

    @torch.no_grad()
    def leave(self, kept: Iterable[Tensor], dropped: Iterable[Tensor] = ()) -> None:
        """Frees the GPU memory behind the tensors. What `dropped` held is undefined afterwards."""
        leaving: dict[int, _Away] = {}
        for tensors, keep in ((kept, True), (dropped, False)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if not tensor.is_cuda or size == 0 or key in leaving or key in self.away:
                    continue
                held = self._pinned(key, size) if keep else None
                if held is not None:
                    held.copy_(_bytes_of(storage), non_blocking=True)
                leaving[key] = _Away(storage, size, held)
        torch.cuda.synchronize()
        for part in leaving.values():
            part.storage.resize_(0)
        self.away |= leaving
        give_back()

    @torch.no_grad()
    def come_back(self) -> None:
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


def give_back() -> None:
    """To the GPU: what torch keeps for later, and buffers that engines have let go of since."""
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
    """Main weights and moments, of every optimizer that `optimizer` chains."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def leave_free(margin_bytes: int) -> None:
    """--train-memory-margin-bytes: this process may grow until only the margin is free.

    At the limit torch gives back its cached blocks before it reports that memory is out.
    """
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.memory_reserved() + free - margin_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, limit / total)))
