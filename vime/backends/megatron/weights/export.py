"""Joins Megatron's shards to full HF tensors, one weight at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vime.backends.megatron.chunks import named_weights
from vime.backends.megatron.hf.family import Weight
from vime.backends.megatron.hf.registry import family_of, model_args
from vime.backends.megatron.parallel import Place, Ranks
from vime.backends.megatron.weights.layout import Dims, hf_shapes, unshard
from vime.config import Config


def export_hf(
    chunks: Iterable[nn.Module], cfg: Config, read: Callable[[str], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, full tensor) of every weight, in the model's order, dtype and device.

    A collective: every rank iterates to the end and gets every tensor. A tensor may be a view of
    the live weights: use it before the next optimizer step. Padding of the vocabulary is cut off.

    read  gets the name of each weight right before it is used, and may free the earlier weights
    """
    args = model_args(cfg)
    family = family_of(cfg)
    ranks, dims = Ranks.current(), Dims.of(args)
    mine = dict(named_weights(chunks, ranks, args))
    device = next(iter(mine.values())).device
    homes = _homes(mine, ranks.pipeline)
    for weight in family.weights(args):
        stage, shard_shape, dtype = homes[_any_expert(weight.mcore)]
        full = None
        part = ranks.tensor if weight.expert is None else ranks.expert_tensor
        if weight.mcore in mine:
            if read is not None:
                read(weight.mcore)
            full = unshard(weight.kind, _gather(mine[weight.mcore].detach(), weight, part), dims)
        shapes = hf_shapes(weight.kind, shard_shape, part.size, dims)
        if weight.expert is not None and ranks.pipeline.rank == stage:
            owner = weight.expert * ranks.expert.size // args["num_experts"]
            full = _broadcast(full, shapes, dtype, device, owner, ranks.expert)
        full = _broadcast(full, shapes, dtype, device, stage, ranks.pipeline)
        yield from zip(weight.hf, full, strict=True)


def _any_expert(name: str) -> str:
    return re.sub(r"\.local_experts\.\d+\.", ".local_experts.*.", name)


def _homes(
    mine: dict[str, Tensor], pipeline: Place
) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
    """{weight: (first stage that holds it, shape of a shard, dtype)}. Experts share an entry."""
    local = {_any_expert(name): (tuple(t.shape), t.dtype) for name, t in mine.items()}
    by_stage: list = [local]
    if pipeline.size > 1:
        by_stage = [None] * pipeline.size
        dist.all_gather_object(by_stage, local, group=pipeline.group)
    homes: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
    for stage, found in enumerate(by_stage):
        for name, (shape, dtype) in found.items():
            homes.setdefault(name, (stage, shape, dtype))
    return homes


def _gather(shard: Tensor, weight: Weight, part: Place) -> list[Tensor]:
    if part.size == 1 or weight.kind.is_replicated:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(part.size)]
    dist.all_gather(shards, shard.contiguous(), group=part.group)
    return shards


def _broadcast(
    full: list[Tensor] | None,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    source: int,
    axis: Place,
) -> list[Tensor]:
    """Sends the tensors `full` from rank `source` of an axis to every rank of the axis."""
    if axis.size == 1:
        assert full is not None
        return [t.contiguous() for t in full]
    if axis.rank == source:
        assert full is not None
        full = [t.contiguous() for t in full]
    else:
        full = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    for tensor in full:
        dist.broadcast(tensor, dist.get_global_rank(axis.group, source), group=axis.group)
    return full
