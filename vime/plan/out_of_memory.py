"""The flags to change when a trainer ran out of GPU memory, with values that should fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vime.config import Config
from vime.plan.parts import GIB
from vime.plan.shape import Shape, shape_of
from vime.plan.tokens import tokens_per_micro_batch
from vime.plan.trainer_memory import largest_tokens, trainer_memory

SPARE = 0.95  # share of the room that a suggested value may fill
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def trainer_remedy(cfg: Config, num_bytes: int, *, longest: int, limit: float | None = None) -> str:
    """The flags that would help, each with its estimated peak.

    num_bytes  bytes of one weight
    longest    tokens of the longest sequence on one GPU; they may exceed --max-tokens-per-gpu
    limit      bytes that the trainer could use; None when unknown
    """
    shape = shape_of(cfg)
    if shape is None:
        return "Lower --max-tokens-per-gpu, or add --recompute-granularity full."
    asked = max(tokens_per_micro_batch(cfg), longest)
    expected = trainer_memory(cfg, shape, num_bytes, asked)
    # An estimate below the limit was too low, so a remedy must also go below the estimate.
    room = SPARE * min(expected.peak, expected.peak if limit is None else limit)
    had = "" if limit is None else f" of {limit / GIB:.1f} GiB"
    lines = [
        f"GPU memory ran out{had}, estimated peak {expected.peak / GIB:.1f} GiB (in "
        f"{expected.phase}, micro-batches of up to {asked:,} tokens). One of these helps:"
    ]
    lines += _fewer_tokens(cfg, shape, num_bytes, room, longest)
    for words, other in _other_layouts(cfg):
        peak = trainer_memory(other, shape, num_bytes, asked).peak
        if peak < room:
            lines.append(f"{words} (estimated peak {peak / GIB:.1f} GiB)")
    if len(lines) == 1:
        lines.append("more GPUs: --actor-num-gpus-per-node and --tensor-model-parallel-size")
    return "\n  - ".join(lines)


def _fewer_tokens(
    cfg: Config, shape: Shape, num_bytes: int, room: float, longest: int
) -> Iterator[str]:
    tokens = largest_tokens(cfg, shape, num_bytes, room)
    if not tokens:
        return
    peak = trainer_memory(cfg, shape, num_bytes, tokens).peak / GIB
    if tokens < longest:
        cp = 2 * cfg.parallel.cp
        yield (
            f"a sequence of {longest:,} tokens on one GPU is more than the {tokens:,} that fit: "
            f"--context-parallel-size {cfg.parallel.cp} -> {cp}, or lower "
            f"--rollout-max-response-len {cfg.rollout.max_response_len}"
        )
    elif cfg.batch.dynamic:
        was = cfg.batch.max_tokens_per_gpu
        yield f"--max-tokens-per-gpu {was} -> {tokens} (estimated peak {peak:.1f} GiB)"
    else:
        was = cfg.batch.micro_batch_size
        yield (
            f"--micro-batch-size {was} -> --use-dynamic-batch-size --max-tokens-per-gpu {tokens} "
            f"(estimated peak {peak:.1f} GiB)"
        )


def _other_layouts(cfg: Config) -> Iterator[tuple[str, Config]]:
    p = cfg.parallel

    def having(**changes: Any) -> Config:
        return replace(cfg, parallel=replace(p, **changes))

    if p.recompute_granularity != "full":
        words = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        yield words, having(**FULL)
    if not p.use_distributed_optimizer and cfg.dp * p.cp > 1:
        yield "--use-distributed-optimizer", having(use_distributed_optimizer=True)
    if cfg.dp % 2 == 0:
        words = f"--tensor-model-parallel-size {p.tp} -> {2 * p.tp} with --sequence-parallel"
        yield words, having(tp=2 * p.tp, sequence_parallel=True)
