"""A memory estimate is a list of parts, each with its size and its formula."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Part:
    """One component: its bytes on one GPU, and the formula that gave them."""

    name: str
    num_bytes: float
    formula: str


def total(parts: list[Part]) -> float:
    return sum(part.num_bytes for part in parts)
