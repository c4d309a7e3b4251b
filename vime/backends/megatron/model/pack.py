"""What is known of a pack on the host and per token: made once for a micro-batch, not once a layer.

Reading a length from the device stops the host until the device has caught up, and every layer
needs the lengths. So they are kept beside the pack in Python, and all that follows from them is
remembered with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vime.backends.megatron.kernels.attention import Spans


def make_pack(bounds: list[int], device: torch.device) -> PackedSeqParams:
    """The pack of sequences whose cumulative lengths, from 0 on, are `bounds`."""
    spans = Spans.of(list(bounds), device)
    pack = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=spans.starts,
        cu_seqlens_kv=spans.starts,
        max_seqlen_q=spans.longest,
        max_seqlen_kv=spans.longest,
    )
    remembered(pack, "spans", lambda: spans)
    return pack


def remembered(pack: PackedSeqParams, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gave for this pack when it was first asked for."""
    notes = pack.__dict__.setdefault("_vime", {})
    if name not in notes:
        notes[name] = make()
    return notes[name]


def starts_of(pack: PackedSeqParams) -> Tensor:
    """[S + 1] int32, cumulative lengths of the whole pack with the padding in it."""
    padded = pack.cu_seqlens_q_padded
    return pack.cu_seqlens_q if padded is None else padded


def spans_of(pack: PackedSeqParams) -> Spans:
    """The sequences of the whole pack, padding included."""
    return remembered(pack, "spans", lambda: Spans(starts_of(pack), starts_of(pack).tolist()))


def bounds_of(pack: PackedSeqParams) -> Sequence[int]:
    """The cumulative lengths of the whole pack, on the host."""
    return spans_of(pack).bounds


def positions_of(pack: PackedSeqParams, tokens: int, cp: int = 1, cp_rank: int = 0) -> Tensor:
    """[tokens] int32: where each of this rank's tokens stands in its sequence.

    tokens   of this rank
    cp       ranks that share each sequence in zigzag chunks: rank r has chunks r and 2 * cp - 1 - r
    """
    return remembered(
        pack, "positions", lambda: _positions(starts_of(pack).long(), tokens, cp, cp_rank)
    )


def _positions(starts: Tensor, tokens: int, cp: int, rank: int) -> Tensor:
    mine = torch.arange(tokens, device=starts.device)
    sequence = torch.bucketize(mine, starts[1:-1] // cp, right=True)
    place = mine - starts[sequence] // cp  # within this rank's share of the sequence
    if cp > 1:
        chunk = starts.diff()[sequence] // (2 * cp)
        second = place >= chunk
        place = torch.where(second, place + (2 * cp - 2 - rank) * chunk, place + rank * chunk)
    return place.int()
