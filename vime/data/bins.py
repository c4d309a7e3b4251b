"""Packs sequences into bins of limited size. A sequence above the limit gets its own bin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fewest_bins(sizes: Sequence[int], cap: int) -> int:
    """A lower bound: total size over `cap`, plus one bin for each sequence above `cap`."""
    fits = [n for n in sizes if n <= cap]
    return len(sizes) - len(fits) + -(-sum(fits) // cap)


def first_fit(sizes: Sequence[int], cap: int) -> list[list[int]]:
    """Bins of indices, each of at most `cap`: the longest first, into the first bin with room."""
    sizes_S = np.asarray(sizes, dtype=np.int64)
    order = np.argsort(-sizes_S, kind="stable").tolist()
    alone = [[i] for i in order if sizes_S[i] > cap]
    rest = order[len(alone) :]
    # A binary tree over all bins that may be needed. A leaf holds the room of its bin, a parent the
    # larger room of its children. Going left wherever there is room finds the first bin that fits.
    leaves = 1 << max(len(rest) - 1, 0).bit_length()
    room = [cap] * (2 * leaves)
    bins: list[list[int]] = []
    for i, size in zip(rest, sizes_S[rest].tolist(), strict=True):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(i)
        room[node] -= size
        while node > 1:
            node //= 2
            larger = max(room[2 * node], room[2 * node + 1])
            if room[node] == larger:
                break
            room[node] = larger
    return alone + bins


def minimum_slack_fit(sizes: Sequence[int], cap: int) -> list[list[int]]:
    """Bins of indices, each of at most `cap`, filled one by one. Often fewer than `first_fit`'s.

    A bin starts with the longest sequence left. Then it takes the one, two or three sequences that
    fill its room best, and repeats this while a sequence fits: Gupta and Ho's minimum bin slack
    (1999) with a search limited to three. A bin is full enough when it wastes no more than the
    average of the fewest bins. 256 sequences take 20 ms; the time grows with the cube of their
    number.
    """
    sizes_S = np.asarray(sizes, dtype=np.int64)
    left = np.argsort(-sizes_S, kind="stable")
    num_alone = int((sizes_S > cap).sum())
    bins = [[i] for i in left[:num_alone].tolist()]
    left = left[num_alone:][::-1]  # shortest first
    target = fewest_bins(sizes, cap)
    spare = (target - num_alone) * cap - int(sizes_S[left].sum())
    while len(left):
        enough = max(spare, 0) // max(target - len(bins), 1)
        members, room = [int(left[-1])], cap - int(sizes_S[left[-1]])
        left = left[:-1]
        while len(left) and sizes_S[left[0]] <= room:
            taken = _best_three(sizes_S[left], room, enough)
            members += left[taken].tolist()
            room -= int(sizes_S[left[taken]].sum())
            left = np.delete(left, taken)
        spare -= room
        bins.append(members)
    return bins


def _best_three(sizes_S: np.ndarray, room: int, enough: int) -> list[int]:
    """Positions of one to three sizes whose sum is the largest within `room`.

    The sizes ascend, and the first must fit. A sum that leaves at most `enough` ends the search.
    """
    sizes_S = sizes_S[: np.searchsorted(sizes_S, room, side="right")]
    total, best = int(sizes_S[-1]), [len(sizes_S) - 1]
    if room - total <= enough or len(sizes_S) < 2:
        return best
    pair_total, pair = _best_pair(sizes_S, room)
    if pair_total > total:
        total, best = pair_total, pair
    for i in range(len(sizes_S) - 1, 1, -1):
        size = int(sizes_S[i])
        if room - total <= enough or 3 * size <= total:  # the other two sizes are not larger
            break
        pair_total, pair = _best_pair(sizes_S[:i], room - size)
        if pair and pair_total + size > total:
            total, best = pair_total + size, [*pair, i]
    return best


def _best_pair(sizes_S: np.ndarray, room: int) -> tuple[int, list[int]]:
    """The largest sum within `room` of two ascending sizes, and their positions; or 0, []."""
    partner_S = np.searchsorted(sizes_S, room - sizes_S, side="right") - 1
    partner_S = np.minimum(partner_S, np.arange(len(sizes_S)) - 1)
    totals_S = np.where(partner_S >= 0, sizes_S + sizes_S[partner_S], 0)
    larger = int(totals_S.argmax())
    total = int(totals_S[larger])
    return total, [int(partner_S[larger]), larger] if total else []
