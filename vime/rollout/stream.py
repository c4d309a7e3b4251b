"""Generation that never stops: groups come in from the data source and go out to the trainer.

The stream uses asyncio only. It gets the functions that generate, judge and abort as arguments.

    take     waits for nothing. Called when the pace has room for more groups
    finish   waits for engines and graders. `abort` makes it return with the tokens so far
    collect  waits for the groups of a step. Each group that ends may complete them
    pace     waits for the trainer: a new weight version makes room for another step's groups
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from vime.errors import EngineError, PluginError
from vime.rollout.sampling import DROPS_PER_KEPT, FAILED
from vime.types import FINISHED, DynamicFilterOutput, Group


class Late(StrEnum):
    """The fate of a group that no step within the cap can train on (--late-groups).

    WAIT     there is none: a step waits for every group that no later step may have
    DROP     it is thrown away
    RESTART  it loses its tokens and begins again with the present weights
    """

    WAIT = "wait"
    DROP = "drop"
    RESTART = "restart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How many groups may start. Step s trains weights of version s (arXiv:2505.24298, eq. 3).

    batch          groups of a step
    max_staleness  N: step s trains on no token that is older than version s - N
    num_steps      steps of the run: no group starts that no step would train on
    spare          groups that may start beyond the groups that the steps take
    """

    batch: int
    max_staleness: int
    num_steps: int
    spare: int = 0

    def room(self, version: int, step: int) -> int:
        """The number of groups that may be outstanding: started, and not yet given to a step.

        Groups that start with weights `version` can go to steps up to version + N. The steps before
        `step` have their groups.
        """
        last = min(version + self.max_staleness, self.num_steps - 1)
        steps = max(0, last - step + 1)
        return steps * self.batch + (self.spare if steps else 0)

    def last_step(self, version: int) -> int:
        """The last step that may train on tokens of a version."""
        return version + self.max_staleness


@dataclass(slots=True)
class Entry:
    """A group that was taken from the data source.

    version   of the engines' weights when the group began: none of its tokens is older
    finished  generated, graded and kept: it waits for its step
    fresh     a copy of the group as it was taken
    num_generating  number of its samples that an engine works on
    """

    group: Group
    version: int
    finished: bool = False
    fresh: Group = field(default_factory=list)
    num_generating: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(sample.response_length for sample in self.group)


@dataclass(slots=True)
class Collected:
    """The groups of a step, in the order of their samples' indices, and what happened meanwhile.

    kept, dropped  as in `sampling.Sampled`
    late           groups that came too late; their tokens are lost
    running, waiting  numbers of groups that still generate, and that wait for a later step
    seconds        since the groups of the previous step were collected
    waited_s       of these, the time that the step waited for its groups
    idle_s         of these, the time in which no group was generated or graded
    """

    kept: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    late: list[Entry] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    num_taken: int = 0
    running: int = 0
    waiting: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    idle_s: float = 0.0


class GroupStream:
    """
    take       n: at most n groups, at least one
    finish     a group: the group, generated and graded, and whether that is complete. It is not
               after an abort. The second argument is called whenever a sample has its response
    judge      whether to train on a group
    abort      makes every pending `finish` return
    renew      a copy of a group without its responses
    at_once    samples that the engines generate at once; more groups start when fewer do
    """

    def __init__(
        self,
        pace: Pace,
        *,
        late: Late = Late.WAIT,
        take: Callable[[int], list[Group]],
        finish: Callable[[Group, Callable[[], None]], Awaitable[tuple[Group, bool]]],
        judge: Callable[[Group], Awaitable[DynamicFilterOutput]],
        abort: Callable[[], Awaitable[None]],
        renew: Callable[[Group], Group],
        at_once: float = math.inf,
    ) -> None:
        self.pace, self.late = pace, late
        self.take, self.finish, self.judge = take, finish, judge
        self.abort, self.renew = abort, renew
        self.at_once = at_once
        self.num_generating = 0
        self.version = 0  # of the engines' weights
        self.step = 0  # the next step to get groups
        self.queued: list[Entry] = []  # outstanding, and neither running nor finished
        self.running: dict[asyncio.Task, Entry] = {}
        self.ready: list[Entry] = []  # finished
        self.suspended = True
        self.error: BaseException | None = None
        self._failed: list[Entry] = []  # since a group last had a reward
        self._news = asyncio.Event()
        self._since = Collected()  # what happened since the last `collect`
        self._collected_at = self._busy_until = time.monotonic()

    @property
    def entries(self) -> list[Entry]:
        """All outstanding groups, in the order in which they began."""
        outstanding = [*self.queued, *self.running.values(), *self.ready]
        return sorted(outstanding, key=_order)

    def restore(self, entries: list[Entry]) -> None:
        """Continue with the `entries` of another stream."""
        for entry in entries:
            entry.fresh = entry.fresh or self.renew(entry.group)
        self.ready += [entry for entry in entries if entry.finished]
        self.queued += [entry for entry in entries if not entry.finished]

    # -- what the loop of the run calls ----------------------------------------------------------

    def resume(self) -> None:
        """Generate, until `suspend`."""
        self.suspended = False
        self._fill()

    async def suspend(self) -> None:
        """Stop all groups where they are. `entries` have their tokens then; `resume` goes on."""
        self.suspended = True
        if self.running:
            await self.abort()
        while self.running:
            await asyncio.wait(list(self.running))
            await asyncio.sleep(0)  # the tasks' callbacks run before this continues

    def weights_are(self, version: int) -> None:
        """The engines have new weights."""
        if version < self.version:
            raise ValueError(f"weights of version {version} after version {self.version}")
        self.version = version
        self.step = max(self.step, version)  # the steps before have been trained
        self._fill()

    async def collect(self, step: int) -> Collected:
        """The groups of a step, as soon as they are there; the oldest first.

        Raises EngineError if the groups fail one after the other: then no group starts until the
        next call. Raises PluginError when a hook breaks its contract.
        """
        began = time.monotonic()
        self.step = step
        self._fill()
        while not self._complete():
            if self.error is not None:
                error, self.error = self.error, None
                self._try_failed_again()
                raise error
            self._news.clear()
            await self._news.wait()
        self.ready.sort(key=_order)
        taken, self.ready = self.ready[: self.pace.batch], self.ready[self.pace.batch :]
        self.step = step + 1
        self._remove_late()
        self._fill()
        return self._report([entry.group for entry in taken], began)

    # --------------------------------------------------------------------------------------------

    def _complete(self) -> bool:
        """Whether the groups of `self.step` are there.

        Under `Late.WAIT`, the groups that are left must have room in later steps. If they cannot
        have room anyway, the step does not wait for more than it takes to lose no further group.
        """
        if len(self.ready) < self.pace.batch:
            return False
        if self.late is not Late.WAIT:
            return True
        begun = [*(entry for entry in self.queued if entry.num_tokens), *self.running.values()]
        ready = sorted(self.ready, key=_order)
        left = [*begun, *ready[self.pace.batch :]]
        best = sorted([*begun, *ready], key=_order)[self.pace.batch :]
        return self._num_late(left) <= self._num_late(best)

    def _num_late(self, entries: list[Entry]) -> int:
        """The number of these groups that are late, if the steps after this one take the oldest."""
        versions = sorted(entry.version for entry in entries)
        steps = (self.step + 1 + i // self.pace.batch for i in range(len(versions)))
        return sum(
            self.pace.last_step(version) < step
            for version, step in zip(versions, steps, strict=True)
        )

    def _fill(self) -> None:
        """Starts as many groups as pace and engines allow."""
        if self.suspended or self.error is not None:
            return
        may_begin = self.pace.last_step(self.version) >= self.step
        for entry in list(self.queued):
            if self.num_generating >= self.at_once:
                return
            if entry.num_tokens or may_begin:
                self.queued.remove(entry)
                self._start(entry)
        outstanding = len(self.queued) + len(self.running) + len(self.ready)
        room = self.pace.room(self.version, self.step) - outstanding
        while room > 0 and self.num_generating < self.at_once:
            try:
                groups = self.take(min(room, self._groups_to_take()))
                if not groups:
                    raise PluginError(f"the data source gave no group but {room} were asked for.")
            except Exception as error:
                self._stop(error)
                return
            self._since.num_taken += len(groups)
            room -= len(groups)
            for group in groups:
                self._start(Entry(group, self.version, fresh=self.renew(group)))

    def _groups_to_take(self) -> int:
        """The number of groups that keep the engines busy, if groups are as large as those now."""
        if math.isinf(self.at_once) or not self.running:
            return self.pace.batch
        size = max(len(entry.group) for entry in self.running.values())
        return max(1, int(self.at_once - self.num_generating) // size)

    def _start(self, entry: Entry) -> None:
        if not entry.num_tokens:
            entry.version = self.version
        if not self.running:
            self._since.idle_s += time.monotonic() - self._busy_until
        entry.num_generating = sum(s.status not in FINISHED for s in entry.group)
        self.num_generating += entry.num_generating
        task = asyncio.ensure_future(self._work(entry))
        self.running[task] = entry
        task.add_done_callback(self._ended)

    def _sample_ended(self, entry: Entry) -> None:
        if entry.num_generating:
            entry.num_generating -= 1
            self.num_generating -= 1
            self._fill()

    async def _work(self, entry: Entry) -> tuple[bool, DynamicFilterOutput | None]:
        """(complete, the verdict)"""
        entry.group, complete = await self.finish(entry.group, partial(self._sample_ended, entry))
        return complete, await self.judge(entry.group) if complete else None

    def _ended(self, task: asyncio.Task) -> None:
        entry = self.running.pop(task, None)
        if entry is not None:
            self._leaves_engines(entry)
        if not self.running:
            self._busy_until = time.monotonic()
        self._news.set()
        if entry is None:  # it came too late and was removed
            if not task.cancelled():
                task.exception()
            return
        if task.cancelled():
            self.queued.append(entry)
        elif (error := task.exception()) is not None:
            self._queue_again(entry)
            self._stop(error)
        else:
            complete, verdict = task.result()
            if complete:
                self._judged(entry, verdict)
            else:
                self.queued.append(entry)
            self._fill()

    def _leaves_engines(self, entry: Entry) -> None:
        self.num_generating -= entry.num_generating
        entry.num_generating = 0

    def _judged(self, entry: Entry, verdict: DynamicFilterOutput) -> None:
        now = self._since
        if verdict.reason == FAILED and not verdict.keep:
            self._failed.append(entry)
        else:
            self._failed = []
        if verdict.keep:
            entry.finished = True
            self.ready.append(entry)
            return
        now.dropped.append(entry.group)
        now.drops[verdict.reason or "filtered"] += 1
        if len(self._failed) >= max(4, self.pace.batch):
            reason = next((s.failure for s in entry.group if s.failure), "no sample has a reward")
            count = len(self._failed)
            self._stop(EngineError(f"{count} groups failed one after the other. Last: {reason}"))
        elif now.drops.total() >= DROPS_PER_KEPT * self.pace.batch:
            reasons = ", ".join(f"{name} {count}" for name, count in now.drops.most_common())
            self._stop(
                PluginError(
                    f"{now.drops.total()} groups were dropped ({reasons}) before step {self.step} "
                    f"had its {self.pace.batch}. Use easier or harder prompts, or another "
                    "--dynamic-sampling-filter-path."
                )
            )

    def _try_failed_again(self) -> None:
        """The groups that led to an error begin again, and do not count as dropped."""
        again = {id(entry.group) for entry in self._failed}
        self._since.dropped = [g for g in self._since.dropped if id(g) not in again]
        self._since.drops[FAILED] -= len(self._failed)
        for entry in self._failed:
            self._queue_again(entry)
        self._failed = []

    def _stop(self, error: BaseException) -> None:
        """No group starts until `collect` has raised the error."""
        if self.error is None:
            self.error = error
        self._news.set()

    def _queue_again(self, entry: Entry) -> None:
        entry.group, entry.finished = self.renew(entry.fresh), False
        self.queued.append(entry)

    def _remove_late(self) -> None:
        """Ends the groups that the steps from `self.step` on may not train on."""

        queued = set(map(id, self.queued))

        def is_late(entry: Entry) -> bool:
            begun = entry.num_tokens or id(entry) not in queued
            return bool(begun) and self.pace.last_step(entry.version) < self.step

        late = [entry for entry in [*self.queued, *self.ready] if is_late(entry)]
        self.queued = [entry for entry in self.queued if not is_late(entry)]
        self.ready = [entry for entry in self.ready if not is_late(entry)]
        for task, entry in list(self.running.items()):
            if is_late(entry):
                del self.running[task]
                self._leaves_engines(entry)
                task.cancel()
                late.append(entry)
        for entry in late:
            self._since.late.append(Entry(entry.group, entry.version, entry.finished))
            if self.late is not Late.DROP:
                self._queue_again(entry)

    def _report(self, kept: list[Group], began: float) -> Collected:
        now = time.monotonic()
        if not self.running:
            self._since.idle_s += now - self._busy_until
            self._busy_until = now
        report, self._since, self._failed = self._since, Collected(), []
        report.kept = sorted(kept, key=lambda group: group[0].index)
        report.running, report.waiting = len(self.running), len(self.ready)
        report.waited_s, report.seconds = now - began, now - self._collected_at
        self._collected_at = now
        return report


def _order(entry: Entry) -> tuple[int, int]:
    return entry.version, entry.group[0].index
