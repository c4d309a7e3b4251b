"""Waits with a deadline for the user's code, which may be slow or ignore its cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Overran(Exception):
    """The work did not end by its deadline."""


class Stopped(Exception):
    """The work was told to stop before it ended."""


async def ended_by(
    work: Coroutine[Any, Any, Any],
    *,
    seconds: float | None = None,
    stopped: asyncio.Event | None = None,
    grace_s: float = 0.0,
) -> Any:
    """The result of `work`. If it comes too late, cancels the work and does not wait for its end.

    Raises Overran after `seconds`, and Stopped `grace_s` after `stopped` is set.
    """
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stopped.wait()) if stopped is not None else None
    try:
        await asyncio.wait(
            {working, stopping} - {None}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if stopping is not None and stopping.done() and not working.done() and grace_s:
            await asyncio.wait({working}, timeout=grace_s)
        if working.done():
            return working.result()
        raise Stopped if stopping is not None and stopping.done() else Overran
    finally:
        if stopping is not None:
            stopping.cancel()
        if not working.done():
            working.cancel()
            working.add_done_callback(_retrieved)


def _retrieved(task: asyncio.Task) -> None:
    """Reads the exception of abandoned work; otherwise asyncio would log a complaint."""
    if not task.cancelled():
        task.exception()
