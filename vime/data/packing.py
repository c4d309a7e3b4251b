"""Plans which sequences share a micro-batch, and on which data-parallel rank.

A plan decides speed and memory. It cannot change the loss, because every token already has its
final weight.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vime.config import Config
from vime.data.bins import fewest_bins, first_fit, minimum_slack_fit
from vime.plan.shape import shape_of
from vime.types import StepPlan

Bin = tuple[int, ...]  # positions of the sequences of one micro-batch

# The sequence length at which causal attention costs as much as the rest of a layer, about
# 12 x hidden size. Only balancing uses it, so one figure is enough for all models.
ATTENTION_EQUALS_REST = 32768

SEARCH_UP_TO = 2048  # sequences: half a second of search; for more sequences, first fit is as good


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingRules:
    """How the sequences of a step become micro-batches.

    dp           number of data-parallel ranks
    max_tokens   maximum tokens of a micro-batch; None: `micro_batch_size` sequences of any length
    granularity  lengths are rounded up to a multiple of this (2 x CP under context parallelism)
    multiple     micro-batches of a rank are a multiple of this (PP under a virtual pipeline)
    balance      give the ranks equal estimated work
    attention_equals_rest  for `sequence_cost`; --balance-by-flops computes it from the model
    """

    dp: int = 1
    max_tokens: int | None = None
    micro_batch_size: int = 1
    granularity: int = 1
    multiple: int = 1
    balance: bool = False
    attention_equals_rest: float = ATTENTION_EQUALS_REST

    @classmethod
    def of(cls, cfg: Config, *, forward_only: bool = False) -> PackingRules:
        batch, parallel = cfg.batch, cfg.parallel
        shape = shape_of(cfg) if batch.balance_by_flops else None
        per_gpu = batch.max_tokens_per_gpu if batch.dynamic else None
        if per_gpu is not None and forward_only:
            per_gpu = batch.log_probs_max_tokens_per_gpu or per_gpu
        return cls(
            dp=cfg.dp,
            max_tokens=None if per_gpu is None else per_gpu * parallel.cp,
            micro_batch_size=batch.micro_batch_size,
            granularity=2 * parallel.cp if parallel.cp > 1 else 1,
            multiple=parallel.pp if parallel.vpp else 1,
            balance=batch.balance or batch.balance_by_flops,
            attention_equals_rest=shape.attention_equals_rest if shape else ATTENTION_EQUALS_REST,
        )


def plan_step(positions: Sequence[int], lengths: Sequence[int], rules: PackingRules) -> StepPlan:
    """The micro-batches of a step, the same number on every rank. Each position occurs once.

    positions  the step's sequences, as positions in the batch
    lengths    their numbers of tokens, in the same order
    """
    size_of = {p: _round_up(n, rules.granularity) for p, n in zip(positions, lengths, strict=True)}
    bins = _fill(positions, size_of, rules, rules.dp)
    share = math.ceil(max(1, len(bins)) / rules.dp)
    share = _round_up(share, rules.multiple)
    bins = _split_to(bins, share * rules.dp, size_of)
    if rules.balance:
        even = rules.attention_equals_rest
        costs = [sum(sequence_cost(size_of[p], even) for p in b) for b in bins]
        owners = balanced_partition(costs, rules.dp)
    else:
        owners = [list(range(rank, len(bins), rules.dp)) for rank in range(rules.dp)]
    return StepPlan(micro_batches=tuple(tuple(bins[i] for i in owned) for owned in owners))


def repack(plans: Sequence[StepPlan], length_of: Sequence[int], rules: PackingRules) -> StepPlan:
    """One plan for all sequences of `plans`, for forward-only passes. Each stays on its rank."""
    per_rank = []
    for rank in range(rules.dp):
        mine = [p for plan in plans for b in plan.micro_batches[rank] for p in b]
        size_of = {p: _round_up(length_of[p], rules.granularity) for p in mine}
        per_rank.append((_fill(mine, size_of, rules, 1), size_of))
    share = _round_up(max(1, *(len(bins) for bins, _ in per_rank)), rules.multiple)
    return StepPlan(
        micro_batches=tuple(tuple(_split_to(bins, share, size_of)) for bins, size_of in per_rank)
    )


def sequence_cost(length: int, attention_equals_rest: float = ATTENTION_EQUALS_REST) -> float:
    """The work of a sequence, estimated in tokens of a short sequence. Attention is quadratic."""
    return length * (1.0 + length / attention_equals_rest)


def balanced_partition(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Divides indices into `num_parts` parts with equal counts and nearly equal sums of costs.

    Karmarkar and Karp's largest differencing method: the two most uneven partial solutions merge,
    the heavy parts of one with the light parts of the other. It starts from blocks with one item
    for each part, so that counts stay equal. `num_parts` must divide len(costs).
    """
    if len(costs) % num_parts:
        raise ValueError(f"{len(costs)} items do not divide into {num_parts} equal parts")
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for serial, start in enumerate(range(0, len(order), num_parts)):
        parts = [(costs[i], [i]) for i in order[start : start + num_parts]]
        heap.append((parts[-1][0] - parts[0][0], serial, parts))
    if not heap:
        return [[] for _ in range(num_parts)]
    heapq.heapify(heap)
    serial = len(heap)
    while len(heap) > 1:
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(x + y, xs + ys) for (x, xs), (y, ys) in zip(a, reversed(b), strict=True)]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], serial, merged))
        serial += 1
    return [sorted(items) for _, items in heap[0][2]]


def _fill(
    positions: Sequence[int], size_of: dict[int, int], rules: PackingRules, num_ranks: int
) -> list[Bin]:
    """Micro-batches for `num_ranks` ranks. Searches only if that can save one on each rank."""
    if rules.max_tokens is None:
        step = rules.micro_batch_size
        return [tuple(positions[i : i + step]) for i in range(0, len(positions), step)]
    sizes, cap = [size_of[p] for p in positions], rules.max_tokens
    packed = first_fit(sizes, cap)
    if len(sizes) <= SEARCH_UP_TO:
        unit = num_ranks * rules.multiple
        fewest = _round_up(fewest_bins(sizes, cap), unit)
        if _round_up(len(packed), unit) > fewest:
            packed = min(packed, minimum_slack_fit(sizes, cap), key=len)
    return [tuple(positions[i] for i in sorted(members)) for members in packed]


def _split_to(bins: list[Bin], count: int, size_of: dict[int, int]) -> list[Bin]:
    """Exactly `count` bins: halves the largest bins; adds empty bins if none can be halved."""
    bins = list(bins)
    heap = [(-sum(size_of[p] for p in b), i) for i, b in enumerate(bins) if len(b) > 1]
    heapq.heapify(heap)  # the largest first, of equal ones the first
    while len(bins) < count:
        if not heap:
            return bins + [()] * (count - len(bins))
        _, largest = heapq.heappop(heap)
        halves: tuple[list[int], list[int]] = ([], [])
        loads = [0, 0]
        for p in sorted(bins[largest], key=lambda p: -size_of[p]):
            side = int(loads[1] < loads[0])
            halves[side].append(p)
            loads[side] += size_of[p]
        bins[largest] = tuple(sorted(halves[0]))
        bins.append(tuple(sorted(halves[1])))
        for i, half, load in zip((largest, len(bins) - 1), halves, loads, strict=True):
            if len(half) > 1:
                heapq.heappush(heap, (-load, i))
    return bins


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
