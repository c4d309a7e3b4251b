"""A pack's lengths on the host, and tables computed from them once for a micro-batch.

Every layer needs the lengths, and reading them from the device makes the host wait until the device
has caught up. So the host keeps them beside the pack, with everything computed from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vime.backends.megatron.kernels.spans import Spans
from vime.backends.megatron.model.zigzag import positions


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
    """The result of `make`, called only once for each pack and name."""
    notes = pack.__dict__.setdefault("_vime", {})
    if name not in notes:
        notes[name] = make()
    return notes[name]


def starts_of(pack: PackedSeqParams) -> Tensor:
    """[S + 1] int32, cumulative lengths of the whole pack, padding included."""
    padded = pack.cu_seqlens_q_padded
    return pack.cu_seqlens_q if padded is None else padded


def spans_of(pack: PackedSeqParams) -> Spans:
    """The sequences of the whole pack, padding included."""
    return remembered(pack, "spans", lambda: Spans(starts_of(pack), starts_of(pack).tolist()))


def bounds_of(pack: PackedSeqParams) -> Sequence[int]:
    """The cumulative lengths of the whole pack, on the host."""
    return spans_of(pack).bounds


def positions_of(pack: PackedSeqParams, tokens: int, cp: int = 1, cp_rank: int = 0) -> Tensor:
    """[tokens] int32: the position of each of this rank's tokens in its sequence.

    cp  ranks that share each sequence in zigzag chunks
    """
    return remembered(
        pack, "positions", lambda: positions(starts_of(pack).long(), tokens, cp, cp_rank)
    )
