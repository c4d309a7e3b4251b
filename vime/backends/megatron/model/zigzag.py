"""Which tokens a context-parallel rank holds, and which keys they see.

Under context parallelism of C ranks a sequence is cut into 2C equal chunks, and rank r holds chunks
r and 2C-1-r (Megatron's zigzag, which evens out the work of causal attention). `bounds` are the
cumulative sequence lengths of the whole pack; each length is divisible by 2C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vime.backends.megatron.kernels.spans import Spans


def zigzag_order(bounds: Sequence[int], size: int) -> Tensor:
    """[T] indices that put the shards, gathered in rank order, back into the pack's order."""
    per_rank = bounds[-1] // size
    order = []
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        chunk = (b - a) // (2 * size)
        for place in range(2 * size):
            rank, half = (place, 0) if place < size else (2 * size - 1 - place, 1)
            first = rank * per_rank + a // size + half * chunk
            order.append(torch.arange(first, first + chunk))
    return torch.cat(order)


def seen_by(
    bounds: Sequence[int], size: int, rank: int, device: Any = None
) -> tuple[Tensor, Spans, Spans]:
    """(rows of the gathered keys, query chunks, keys of each chunk) of one rank.

    The rows index the shards gathered in rank order. A chunk sees its sequence from the sequence's
    start to the chunk's end.
    """
    place_in_shards = zigzag_order(bounds, size)
    rows, queries, keys = [], [0], [0]
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        chunk = (b - a) // (2 * size)
        for place in (rank, 2 * size - 1 - rank):
            seen = (place + 1) * chunk
            rows.append(place_in_shards[a : a + seen])
            queries.append(queries[-1] + chunk)
            keys.append(keys[-1] + seen)
    return torch.cat(rows).to(device), Spans.of(queries, device), Spans.of(keys, device)


def positions(starts: Tensor, tokens: int, size: int, rank: int) -> Tensor:
    """[tokens] int32: the position of each of this rank's tokens in its sequence.

    starts  [S + 1] the bounds, on the device
    """
    mine = torch.arange(tokens, device=starts.device)
    sequence = torch.bucketize(mine, starts[1:-1] // size, right=True)
    place = mine - starts[sequence] // size  # within this rank's share of the sequence
    if size > 1:
        chunk = starts.diff()[sequence] // (2 * size)
        second = place >= chunk
        place = torch.where(second, place + (2 * size - 2 - rank) * chunk, place + rank * chunk)
    return place.int()
