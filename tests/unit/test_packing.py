"""Every packing trains on every sequence exactly once."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.data.bins import fewest_bins, first_fit, minimum_slack_fit
from vime.data.packing import (
    PackingRules,
    balanced_partition,
    plan_step,
    repack,
    sequence_cost,
)

lengths_strategy = st.lists(st.integers(1, 300), min_size=1, max_size=60)
rules_strategy = st.builds(
    PackingRules,
    dp=st.integers(1, 5),
    max_tokens=st.one_of(st.none(), st.integers(50, 400)),
    micro_batch_size=st.integers(1, 7),
    granularity=st.sampled_from([1, 4, 8]),
    multiple=st.sampled_from([1, 2, 3]),
    balance=st.booleans(),
)


def up(n, g):
    return -(-n // g) * g


def check(plan, positions, size_of, rules):
    placed = [p for rank in plan.micro_batches for b in rank for p in b]
    assert Counter(placed) == Counter(positions)
    assert len(plan.micro_batches) == rules.dp
    counts = {len(rank) for rank in plan.micro_batches}
    assert len(counts) == 1
    assert plan.num_micro_batches >= 1
    assert plan.num_micro_batches % rules.multiple == 0
    for rank in plan.micro_batches:
        for b in rank:
            if rules.max_tokens is None:
                assert len(b) <= rules.micro_batch_size
            else:
                assert len(b) <= 1 or sum(size_of[p] for p in b) <= rules.max_tokens


@given(lengths_strategy, rules_strategy)
@settings(max_examples=200, deadline=None)
def test_a_plan_has_every_sequence_once_within_the_cap_and_equal_counts_per_rank(lengths, rules):
    positions = range(10, 10 + len(lengths))
    size_of = {p: up(n, rules.granularity) for p, n in zip(positions, lengths, strict=True)}
    check(plan_step(positions, lengths, rules), positions, size_of, rules)


@given(lengths_strategy, rules_strategy, st.integers(30, 900))
@settings(max_examples=100, deadline=None)
def test_the_forward_plan_keeps_every_sequence_on_its_rank(lengths, rules, cap):
    half = len(lengths) // 2
    plans = [
        plan_step(range(a, b), lengths[a:b], rules)
        for a, b in ((0, half), (half, len(lengths)))
        if b > a
    ]
    forward_rules = PackingRules(dp=rules.dp, max_tokens=cap, granularity=rules.granularity)
    size_of = {p: up(n, rules.granularity) for p, n in enumerate(lengths)}
    plan = repack(plans, lengths, forward_rules)
    check(plan, range(len(lengths)), size_of, forward_rules)
    for rank in range(rules.dp):
        before = {p for q in plans for b in q.micro_batches[rank] for p in b}
        assert {p for b in plan.micro_batches[rank] for p in b} == before


def test_first_fit_fills_the_first_bin_with_room():
    # longest first: 6 opens a bin, 5 another, 4 joins 6, 3 joins 5, 2 joins 5 and 3
    assert first_fit([4, 6, 3, 5, 2], cap=10) == [[1, 0], [3, 2, 4]]


def test_minimum_slack_fit_fills_bins_that_first_fit_leaves_open():
    sizes = [7, 6, 5, 4, 4, 4]
    assert first_fit(sizes, cap=15) == [[0, 1], [2, 3, 4], [5]]  # 7 6, 5 4 4, 4
    assert minimum_slack_fit(sizes, cap=15) == [[0, 5, 4], [1, 3, 2]]  # 7 4 4, 6 4 5


@given(st.lists(st.integers(1, 120), min_size=1, max_size=60), st.integers(20, 100))
@settings(max_examples=200, deadline=None)
def test_minimum_slack_fit_places_every_sequence_once_within_the_cap(sizes, cap):
    bins = minimum_slack_fit(sizes, cap)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    assert all(len(b) == 1 or sum(sizes[i] for i in b) <= cap for b in bins)
    assert len(bins) >= fewest_bins(sizes, cap)


def test_the_smallest_possible_number_of_bins():
    assert fewest_bins([5, 5, 5], cap=10) == 2
    assert fewest_bins([50, 5, 5], cap=10) == 2
    assert fewest_bins([], cap=10) == 0


def test_a_sequence_longer_than_the_cap_has_its_own_micro_batch():
    plan = plan_step(range(3), [5, 50, 5], PackingRules(max_tokens=10))
    assert sorted(plan.micro_batches[0]) == [(0, 2), (1,)]


def test_context_parallel_padding_counts_towards_the_cap():
    rules = PackingRules(max_tokens=16, granularity=8)
    assert plan_step(range(2), [9, 1], rules).num_micro_batches == 2
    assert plan_step(range(2), [8, 1], rules).num_micro_batches == 1


def test_too_few_sequences_leave_empty_micro_batches():
    plan = plan_step([7], [5], PackingRules(dp=2, max_tokens=10))
    assert plan.micro_batches == (((7,),), ((),))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_a_balanced_partition_has_equal_counts_and_is_at_least_as_even_as_dealing(costs, parts):
    costs = costs[: len(costs) // parts * parts]
    result = balanced_partition(costs, parts)
    assert sorted(i for part in result for i in part) == list(range(len(costs)))
    assert len({len(part) for part in result}) == 1
    ordered = sorted(costs, reverse=True)
    dealt = [sum(ordered[r::parts]) for r in range(parts)]
    balanced = [sum(costs[i] for i in part) for part in result]
    assert max(balanced, default=0) <= max(dealt, default=0)


def test_balancing_is_more_even_than_dealing():
    costs = [8.0, 7.0, 6.0, 5.0, 4.0, 4.0]
    sums = sorted(sum(costs[i] for i in part) for part in balanced_partition(costs, 2))
    assert sums == [17.0, 17.0]
    with pytest.raises(ValueError, match="6 items"):
        balanced_partition(costs, 4)


def test_one_long_sequence_costs_more_than_two_of_half_its_length():
    assert sequence_cost(4096) > 2 * sequence_cost(2048)


def test_a_sequence_of_that_length_costs_twice_its_tokens():
    assert sequence_cost(100, 100) == 200
    assert sequence_cost(100, 50) == 300


def test_a_long_tailed_batch_fills_its_packs_and_gives_ranks_equal_work():
    rng = np.random.default_rng(0)
    lengths = (np.clip(rng.lognormal(7.6, 0.8, 256), 64, 8192).astype(int) + 200).tolist()
    plan = plan_step(range(256), lengths, PackingRules(dp=2, max_tokens=9216, balance=True))
    assert sum(lengths) / (2 * plan.num_micro_batches * 9216) > 0.97
    work = [sum(sequence_cost(lengths[p]) for b in r for p in b) for r in plan.micro_batches]
    assert max(work) / (sum(work) / 2) < 1.03
