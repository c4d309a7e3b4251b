"""Where the sequences of a pack begin and end, on the device and on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Spans:
    """The sequences of a pack, one after another.

    starts  [S + 1] int32, cumulative lengths on the device
    bounds  the same numbers on the host
    """

    starts: Tensor
    bounds: Sequence[int]

    @classmethod
    def of(cls, bounds: Sequence[int], device: Any) -> Spans:
        return cls(torch.tensor(bounds, dtype=torch.int32, device=device), bounds)

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def longest(self) -> int:
        return max(self.lengths)
