"""The user's code ends by its deadline, or vime stops waiting for it."""

import asyncio

import pytest

from vime.rollout.deadline import Overran, Stopped, ended_by


async def stubborn(ended):
    """Ignores the first cancellation."""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(0.01)
        ended.append("cancelled")
        raise ValueError("nobody reads this") from None


def test_work_that_overruns_is_cancelled_and_nobody_waits_for_its_cleaning_up():
    ended = []

    async def main():
        with pytest.raises(Overran):
            await ended_by(stubborn(ended), seconds=0.01)
        assert ended == []
        await asyncio.sleep(0.1)
        assert ended == ["cancelled"]

    asyncio.run(main())


def test_a_stop_waits_for_its_grace_and_accepts_work_that_ends_before():
    async def main(work_s, grace_s):
        stopped = asyncio.Event()
        stopped.set()
        return await ended_by(
            asyncio.sleep(work_s, "done"), seconds=60, stopped=stopped, grace_s=grace_s
        )

    assert asyncio.run(main(0.01, 30.0)) == "done"
    with pytest.raises(Stopped):
        asyncio.run(main(60, 0.01))


def test_errors_of_the_work_pass_and_cancelling_the_caller_cancels_the_work():
    ended = []

    async def fails():
        raise TimeoutError("the work's own")

    async def main():
        with pytest.raises(TimeoutError, match="own"):
            await ended_by(fails(), seconds=60)
        task = asyncio.create_task(ended_by(stubborn(ended), seconds=60))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)

    asyncio.run(main())
    assert ended == ["cancelled"]
