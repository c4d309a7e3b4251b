"""The sampling loop: submits groups, judges each finished one, stops exactly at the target.

The loop uses asyncio only. It gets the functions that generate, judge and abort as arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from vime.errors import EngineError, PluginError
from vime.types import DynamicFilterOutput, Group, Status

FAILED = "failed"  # the reason for dropping a group without any usable sample
DROPS_PER_KEPT = 100  # a filter with more drops per wanted group ends the run


@dataclass(slots=True)
class Sampled:
    """The groups of a sampling loop, by outcome.

    kept        the target number of groups, ordered by the index of their first sample
    surplus     groups that finished after the target was met
    unfinished  aborted groups, with the tokens that they had
    dropped     groups that the judge dropped
    drops       {reason: number of dropped groups}
    """

    kept: list[Group] = field(default_factory=list)
    surplus: list[Group] = field(default_factory=list)
    unfinished: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    num_taken: int = 0


async def sample_groups(
    *,
    target: int,
    batch: int,
    take: Callable[[int], list[Group]],
    finish: Callable[[Group], Awaitable[Group]],
    judge: Callable[[Group], Awaitable[DynamicFilterOutput]],
    abort: Callable[[], Awaitable[None]],
) -> Sampled:
    """Takes `batch` more groups whenever kept and pending ones together cannot reach `target`.

    Example: target 32 and batch 64 take another 64 groups at the 33rd drop. As soon as the target
    is met the pending groups are aborted: `abort()` must make every pending `finish` return. An
    exception of any part ends the loop after an abort.
    """
    result = Sampled()
    pending: dict[asyncio.Task, Group] = {}
    finished: asyncio.Queue[asyncio.Task] = asyncio.Queue()
    failed_in_a_row = 0

    def submit(groups: list[Group]) -> None:
        if not groups:
            raise PluginError(f"the data source gave no group but {batch} were asked for.")
        result.num_taken += len(groups)
        for group in groups:
            task = asyncio.ensure_future(finish(group))
            pending[task] = group
            task.add_done_callback(finished.put_nowait)

    try:
        while len(result.kept) < target:
            while len(result.kept) + len(pending) < target:
                submit(take(batch))
            task = await finished.get()
            del pending[task]
            group = task.result()
            verdict = await judge(group)
            if verdict.keep:
                result.kept.append(group)
            else:
                result.dropped.append(group)
                result.drops[verdict.reason or "filtered"] += 1
            failed_in_a_row = failed_in_a_row + 1 if verdict.reason == FAILED else 0
            _give_up_if_hopeless(result, target, batch, failed_in_a_row, group)
    except BaseException:
        await _end(pending, abort)
        raise
    if pending:
        await _abort_and_collect(pending, finished, abort, result)
    result.kept.sort(key=lambda group: group[0].index)
    return result


def _give_up_if_hopeless(
    result: Sampled, target: int, batch: int, failed_in_a_row: int, group: Group
) -> None:
    if failed_in_a_row >= max(4, batch):
        reason = next((s.failure for s in group if s.failure), "no sample has a reward")
        raise EngineError(
            f"{failed_in_a_row} groups failed one after the other. The last one: {reason}"
        )
    if result.drops.total() >= DROPS_PER_KEPT * (target + len(result.kept)):
        reasons = ", ".join(f"{reason} {count}" for reason, count in result.drops.most_common())
        raise PluginError(
            f"{result.drops.total()} groups were dropped ({reasons}) and {len(result.kept)} of "
            f"{target} kept. Use easier or harder prompts, or another "
            "--dynamic-sampling-filter-path."
        )


async def _abort_and_collect(
    pending: dict[asyncio.Task, Group],
    finished: asyncio.Queue[asyncio.Task],
    abort: Callable[[], Awaitable[None]],
    result: Sampled,
) -> None:
    """Aborts the pending groups and sorts all of them into surplus and unfinished."""

    async def collect() -> None:
        while pending:
            task = await finished.get()
            del pending[task]
            group = task.result()
            ended = all(s.status not in (Status.PENDING, Status.ABORTED) for s in group)
            (result.surplus if ended else result.unfinished).append(group)

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(collect())
            tasks.create_task(abort())
    except BaseExceptionGroup as errors:
        await _end(pending, None)
        raise errors.exceptions[0] from None
    for groups in (result.surplus, result.unfinished):
        groups.sort(key=lambda group: group[0].index)


async def _end(
    pending: dict[asyncio.Task, Group], abort: Callable[[], Awaitable[None]] | None
) -> None:
    """Cancels the pending groups, and their requests at the engines that still answer."""
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    if abort is not None and pending:
        with contextlib.suppress(EngineError):  # the caller reports the first error
            await abort()
