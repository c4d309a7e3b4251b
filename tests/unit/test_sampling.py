"""The sampling loop on a simulated engine with random latencies, failures and filters."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.errors import EngineError, PluginError
from vime.rollout.sampling import FAILED, sample_groups
from vime.types import DynamicFilterOutput, Sample, Status


class Simulation:
    """Groups of two samples that take a few turns of the event loop, and drop or fail at random."""

    def __init__(self, seed, drop=0.0, fail=0.0, abort_is_late=0):
        self.rng = random.Random(seed)
        self.drop, self.fail, self.abort_is_late = drop, fail, abort_is_late
        self.taken = []  # (requested batch size, number of drops by then)
        self.groups = []
        self.num_dropped = 0
        self.aborting = False
        self.tokens_made = 0

    def take(self, count):
        self.taken.append((count, self.num_dropped))
        first = len(self.groups)
        new = [
            [Sample(group_index=g, index=2 * g + i) for i in range(2)]
            for g in range(first, first + count)
        ]
        self.groups += new
        return new

    async def finish(self, group):
        turns = [self.rng.randrange(12) for _ in group]
        fails = self.rng.random() < self.fail
        for turn in range(max(turns)):
            await asyncio.sleep(0)
            for sample, end in zip(group, turns, strict=True):
                if turn < end and not self.aborting:
                    sample.tokens.append(turn)
                    sample.response_length += 1
                    self.tokens_made += 1
            if self.aborting:
                break
        for sample, end in zip(group, turns, strict=True):
            cut = sample.response_length < end
            sample.status = Status.ABORTED if cut else Status.COMPLETED
            if fails and not cut:
                sample.status, sample.failure = Status.FAILED, "by chance"
        return group

    async def judge(self, group):
        if all(s.status is Status.FAILED for s in group):
            self.num_dropped += 1
            return DynamicFilterOutput(False, FAILED)
        if self.rng.random() < self.drop:
            self.num_dropped += 1
            return DynamicFilterOutput(False, "dull")
        return DynamicFilterOutput(True)

    async def abort(self):
        for _ in range(self.abort_is_late):
            await asyncio.sleep(0)
        self.aborting = True

    def run(self, target, batch):
        return asyncio.run(
            asyncio.wait_for(
                sample_groups(
                    target=target,
                    batch=batch,
                    take=self.take,
                    finish=self.finish,
                    judge=self.judge,
                    abort=self.abort,
                ),
                30,
            )
        )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    target=st.integers(1, 12),
    extra=st.integers(0, 20),
    drop=st.floats(0, 0.7),
    fail=st.floats(0, 0.2),
    late=st.integers(0, 20),
)
def test_exactly_the_target_is_kept_and_no_sample_is_lost_or_doubled(
    seed, target, extra, drop, fail, late
):
    simulation = Simulation(seed, drop, fail, late)
    result = simulation.run(target, target + extra)
    assert len(result.kept) == target
    assert all(s.status is not Status.ABORTED for g in result.kept for s in g)
    left = result.kept + result.surplus + result.unfinished + result.dropped
    ids = [g[0].group_index for g in left]
    assert len(ids) == len(set(ids))
    assert len(left) == len(simulation.groups) == result.num_taken
    assert len(result.dropped) == result.drops.total()
    for some in (result.kept, result.surplus, result.unfinished):
        indices = [s.index for g in some for s in g]
        assert indices == sorted(indices)
    made = sum(s.response_length for g in simulation.groups for s in g)
    assert made == simulation.tokens_made
    # A refill comes exactly when kept and pending groups can no longer reach the target.
    submitted = 0
    for count, dropped in simulation.taken:
        assert submitted - dropped < target
        submitted += count


def test_with_a_target_of_32_and_batches_of_64_the_33rd_drop_takes_64_more():
    for num_drops, taken in ((32, [(64, 0)]), (33, [(64, 0), (64, 33)])):
        simulation = Simulation(0)
        verdicts = iter([DynamicFilterOutput(False, "dull")] * num_drops)

        async def judge(group, simulation=simulation, verdicts=verdicts):
            verdict = next(verdicts, DynamicFilterOutput(True))
            simulation.num_dropped += not verdict.keep
            return verdict

        simulation.judge = judge
        result = simulation.run(32, 64)
        assert simulation.taken == taken
        assert result.drops == {"dull": num_drops}
        assert len(result.kept) == 32


def test_the_rest_is_aborted_as_soon_as_the_target_is_met():
    simulation = Simulation(1)
    result = simulation.run(4, 64)
    assert simulation.aborting
    assert len(result.unfinished) > 30
    assert len(result.kept) + len(result.surplus) + len(result.unfinished) == 64


def test_an_error_in_a_group_ends_the_loop_and_cancels_the_others():
    simulation = Simulation(2)
    cancelled = []

    async def finish(group):
        if group[0].group_index == 3:
            raise ValueError("a plugin's own")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(group[0].group_index)
            raise

    async def abort():
        assert len(cancelled) == 7  # the requests have gone before
        simulation.aborting = True

    simulation.finish, simulation.abort = finish, abort
    with pytest.raises(ValueError, match="a plugin's own"):
        simulation.run(4, 8)
    assert sorted(cancelled) == [0, 1, 2, 4, 5, 6, 7]
    assert simulation.aborting


def test_the_rollout_ends_if_engines_only_fail_or_filters_only_drop():
    with pytest.raises(EngineError, match="4 groups failed one after the other. The last.*: by ch"):
        Simulation(3, fail=1.0).run(2, 4)
    with pytest.raises(PluginError, match="dull 200.*0 of 2 kept"):
        Simulation(4, drop=1.0).run(2, 4)
    empty = Simulation(5)
    empty.take = lambda count: []
    with pytest.raises(PluginError, match="no group"):
        empty.run(2, 4)
