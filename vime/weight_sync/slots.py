"""Two buffers for buckets, used in turn."""

from __future__ import annotations

import torch
from torch import Tensor


class Slots:
    """One buffer is filled while the engines read the other.

    `clear` frees both after each update: on a shared GPU the engines' caches need the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[int, Tensor] = {}
        self.turn = 0

    def next(self, size: int) -> tuple[int, Tensor, bool]:
        """(slot, its buffer of at least `size` bytes, whether the buffer is new)."""
        slot, self.turn = self.turn, 1 - self.turn
        fresh = slot not in self.buffers or self.buffers[slot].numel() < size
        if fresh:
            self.buffers.pop(slot, None)  # freed before the new buffer is allocated
            self.buffers[slot] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return slot, self.buffers[slot], fresh

    def clear(self) -> None:
        self.buffers.clear()
        self.turn = 0
