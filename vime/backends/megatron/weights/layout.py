"""Splits a weight over tensor parallel ranks and joins it again. Pure functions of tensors.

A query/key/value weight has G groups, which Megatron stores one after another. A group has H/G
query heads, one key head and one value head, each of D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vime.backends.megatron.hf.family import Kind


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes on which the layouts depend."""

    heads: int
    groups: int
    channels: int
    vocab: int

    @classmethod
    def of(cls, args: dict[str, Any]) -> Dims:
        """`args`: the architecture under Megatron's flag names."""
        heads = args["num_attention_heads"]
        groups = args["num_query_groups"] if args.get("group_query_attention") else heads
        return cls(heads, groups, args["kv_channels"], args["vocab_size"])


def hf_shapes(
    kind: Kind, shard: Sequence[int], num_ranks: int, dims: Dims
) -> list[tuple[int, ...]]:
    """The shapes of the full HF tensors, from the shape `shard` of one rank's shard."""
    rows, rest = shard[0], tuple(shard[1:])
    match kind:
        case Kind.REPLICATED:
            return [tuple(shard)]
        case Kind.VOCAB:
            return [(dims.vocab, *rest)]
        case Kind.COLUMN:
            return [(rows * num_ranks, *rest)]
        case Kind.ROW:
            return [(rows, rest[0] * num_ranks)]
        case Kind.GLU:
            return [(rows // 2 * num_ranks, *rest)] * 2
        case Kind.GLU_MERGED:
            return [(rows * num_ranks, *rest)]
        case Kind.QKV:
            q, kv = dims.heads * dims.channels, dims.groups * dims.channels
            return [(q, *rest), (kv, *rest), (kv, *rest)]


def shard(
    kind: Kind, tensors: Sequence[Tensor], rank: int, num_ranks: int, dims: Dims, rows: int
) -> Tensor:
    """One rank's shard of full HF tensors. It has `rows` rows, including vocabulary padding."""
    first = tensors[0]
    match kind:
        case Kind.REPLICATED:
            return first
        case Kind.VOCAB:
            part = first[rank * rows : (rank + 1) * rows]
            return F.pad(part, (0, 0) * (first.dim() - 1) + (0, rows - part.shape[0]))
        case Kind.COLUMN:
            return first.chunk(num_ranks)[rank]
        case Kind.ROW:
            return first.chunk(num_ranks, dim=1)[rank]
        case Kind.GLU:
            return torch.cat([t.chunk(num_ranks)[rank] for t in tensors])
        case Kind.GLU_MERGED:
            return torch.cat([t.chunk(num_ranks)[rank] for t in first.chunk(2)])
        case Kind.QKV:
            by_group = [t.reshape(dims.groups, -1, *t.shape[1:]) for t in tensors]
            mine = [t.chunk(num_ranks)[rank] for t in by_group]
            return torch.cat(mine, dim=1).flatten(0, 1)


def unshard(kind: Kind, shards: Sequence[Tensor], dims: Dims) -> list[Tensor]:
    """The full HF tensors from every rank's shard, in rank order. Inverse of `shard`."""
    match kind:
        case Kind.REPLICATED:
            return [shards[0]]
        case Kind.VOCAB:
            return [_cat(shards)[: dims.vocab]]
        case Kind.COLUMN:
            return [_cat(shards)]
        case Kind.ROW:
            return [_cat(shards, dim=1)]
        case Kind.GLU | Kind.GLU_MERGED:
            halves = [s.chunk(2) for s in shards]
            gate_and_up = [_cat([gate for gate, _ in halves]), _cat([up for _, up in halves])]
            return gate_and_up if kind is Kind.GLU else [_cat(gate_and_up)]
        case Kind.QKV:
            full = _cat(shards)
            per_group = dims.heads // dims.groups
            by_group = full.view(dims.groups, (per_group + 2) * dims.channels, *full.shape[1:])
            sizes = [per_group * dims.channels, dims.channels, dims.channels]
            return [part.flatten(0, 1) for part in by_group.split(sizes, dim=1)]


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)
