"""The fully asynchronous stream: its real asyncio code, driven through random schedules by fakes.

The clock is virtual, so a schedule of minutes takes milliseconds.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from vime.errors import EngineError
from vime.rollout.sampling import FAILED
from vime.rollout.stream import Collected, Entry, GroupStream, Late, Pace
from vime.types import DynamicFilterOutput, Group, Sample, Status

SCHEDULES = 10_000


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer. It raises if it would wait for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

        def jump(timeout: float | None) -> list:
            if timeout is None:
                raise RuntimeError("deadlock: nothing is left that could happen")
            self.now += timeout
            return []

        self._selector.select = jump

    def time(self) -> float:
        return self.now


def in_virtual_time(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(work)


class World:
    """A data source, an engine with weights, and a trainer; all of them fakes."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.staleness, batch = rng.randint(0, 4), rng.randint(1, 4)
        self.interval = rng.randint(1, self.staleness + 1)  # --update-weights-interval
        self.pace = Pace(
            batch=batch,
            max_staleness=self.staleness,
            num_steps=rng.randint(2, 5),
            spare=rng.choice([0, 0, batch]),
        )
        self.late = rng.choice(list(Late))
        self.drop_share = rng.choice([0.0, 0.0, 0.4])
        self.failing = rng.choice([0.0, 0.0, 0.3])  # share of the groups that lose their engine
        self.has_failures = self.failing > 0
        self.training_s = rng.choice([0.1, 3.0, 30.0])
        self.updating_s = rng.choice([0.0, 5.0])
        self.at_once = rng.choice([math.inf, 2, 5])
        self.cursor = 0
        self.version = 0
        self.aborted = False
        self.pending: set[asyncio.Future] = set()
        self.trained: dict[int, list[int]] = {}  # {step: indices of its groups}
        self.dropped: set[int] = set()

    def take(self, count: int) -> list[Group]:
        groups = [
            [Sample(index=2 * i + j, group_index=i, tokens=[1, 2]) for j in range(2)]
            for i in range(self.cursor, self.cursor + self.rng.randint(1, count))
        ]
        self.cursor += len(groups)
        return groups

    async def finish(self, group: Group, ended: Callable[[], None]) -> tuple[Group, bool]:
        """Each sample gets a token when it begins or goes on, and one at its end."""
        for sample in group:
            if sample.status not in (Status.PENDING, Status.ABORTED):
                continue
            self.add_token(sample)
            if await self.is_aborted(self.rng.lognormvariate(0.0, 1.5)):
                sample.status = Status.ABORTED
                return group, False
            self.add_token(sample)
            sample.status = Status.COMPLETED
            ended()
        if self.rng.random() < self.failing:
            for sample in group:
                sample.status, sample.failure = Status.FAILED, "request failed: the engine is away"
        return group, True

    def add_token(self, sample: Sample) -> None:
        sample.tokens = [*sample.tokens, 7]
        sample.weight_versions = [*sample.weight_versions, self.version]
        sample.response_length += 1

    async def is_aborted(self, seconds: float) -> bool:
        """Whether an abort comes before the time is over."""
        if self.aborted:
            return True
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        self.pending.add(ended)
        timer = loop.call_later(seconds, lambda: ended.done() or ended.set_result(False))
        try:
            return await ended
        finally:
            timer.cancel()
            self.pending.discard(ended)

    async def judge(self, group: Group) -> DynamicFilterOutput:
        if group[0].status is Status.FAILED:
            return DynamicFilterOutput(False, FAILED)
        return DynamicFilterOutput(self.rng.random() >= self.drop_share, "filtered")

    async def abort(self) -> None:
        self.aborted = True
        for ended in list(self.pending):
            ended.done() or ended.set_result(True)

    def stream(self) -> GroupStream:
        return GroupStream(
            self.pace,
            late=self.late,
            take=self.take,
            finish=self.finish,
            judge=self.judge,
            abort=self.abort,
            renew=renewed,
            at_once=self.at_once,
        )

    def check(self, step: int, groups: list[Group]) -> None:
        assert len(groups) == self.pace.batch
        for group in groups:
            assert all(sample.status is Status.COMPLETED for sample in group)
            for sample in group:
                versions = sample.weight_versions
                assert versions == sorted(versions)
                assert len(versions) == sample.response_length > 0
                assert step - self.staleness <= versions[0]
                assert versions[-1] <= step


def renewed(group: Group) -> Group:
    return [Sample(index=s.index, group_index=s.group_index, tokens=[1, 2]) for s in group]


def copied(entries: list[Entry]) -> list[Entry]:
    def copy(group: Group) -> Group:
        return [Sample.from_dict(sample.to_dict()) for sample in group]

    return [Entry(copy(e.group), e.version, e.finished, copy(e.fresh)) for e in entries]


async def run_schedule(seed: int) -> World:
    """A whole run, with a crash and a resumption at any point."""
    world = World(seed)
    rng = world.rng
    stream = world.stream()
    saved: dict[str, Any] | None = None
    crash_at = rng.choice([None, rng.randrange(world.pace.num_steps)])
    stream.weights_are(0)
    stream.resume()
    step = 0
    while step < world.pace.num_steps:
        try:
            collected = await stream.collect(step)
        except EngineError:  # the run starts the engine again
            world.failing = 0.0
            continue
        world.check(step, collected.kept)
        world.trained[step] = [group[0].group_index for group in collected.kept]
        world.dropped |= dropped_in(world, collected)
        if world.late is Late.WAIT and not world.pace.spare and not world.has_failures:
            assert not collected.late
        await asyncio.sleep(world.training_s * rng.random())
        if rng.random() < 0.4:
            await stream.suspend()
            saved = {
                "entries": copied(stream.entries),
                "cursor": world.cursor,
                "step": step + 1,
                "trained": dict(world.trained),
                "dropped": world.dropped | dropped_in(world, stream._since),
            }
            world.aborted = False
            stream.resume()
        if step == crash_at and saved is not None:
            await stream.suspend()
            world.aborted = False
            crash_at, stream = None, world.stream()
            world.cursor, step = saved["cursor"], saved["step"]
            world.trained, world.dropped = saved["trained"], saved["dropped"]
            stream.restore(saved["entries"])
            world.version = step
            stream.weights_are(step)
            stream.resume()
            continue
        step += 1
        if step % world.interval == 0:
            await asyncio.sleep(world.updating_s * rng.random())
            world.version = step
            stream.weights_are(step)
    await stream.suspend()
    assert stream.num_generating == 0
    check_the_account(world, stream)
    return world


def dropped_in(world: World, collected: Collected) -> set[int]:
    groups = list(collected.dropped)
    if world.late is Late.DROP:
        groups += [entry.group for entry in collected.late]
    return {group[0].group_index for group in groups}


def check_the_account(world: World, stream: GroupStream) -> None:
    """Every group that was taken was trained once, dropped with a reason, or is still there."""
    trained = [index for groups in world.trained.values() for index in groups]
    assert len(trained) == len(set(trained)) == world.pace.num_steps * world.pace.batch
    left = {entry.group[0].group_index for entry in stream.entries}
    left |= dropped_in(world, stream._since)
    assert set(range(world.cursor)) == set(trained) | world.dropped | left
    assert not set(trained) & (world.dropped | left)


@pytest.mark.parametrize("part", range(10))
def test_random_schedules_keep_the_cap_and_lose_nothing(part):
    for seed in range(part * SCHEDULES // 10, (part + 1) * SCHEDULES // 10):
        try:
            in_virtual_time(run_schedule(seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
