"""Threads for users' plain functions, which may block. Nobody joins them.

asyncio's own threads hold a rollout and the process open until every call has returned.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

NUM_THREADS = 32  # calls at once, calls past their deadline included; the others wait


class DaemonThreads:
    """At most `limit` threads, which start when needed and end with the process."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._calls: SimpleQueue[tuple[Future, Callable[[], Any]]] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._num_threads = 0

    def submit(self, call: Callable[[], Any]) -> Future:
        """The result of `call()`. A call that was cancelled before its turn never starts."""
        future: Future = Future()
        self._calls.put((future, call))
        if not self._idle.acquire(blocking=False):
            with self._lock:
                if self._num_threads < self._limit:
                    self._num_threads += 1
                    threading.Thread(target=self._work, name="vime-plugin", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del future, call
            self._idle.release()


_threads = DaemonThreads(NUM_THREADS)


async def in_thread(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """What the function returns. A caller that is cancelled leaves the call behind."""
    call = partial(contextvars.copy_context().run, function, *args, **kwargs)
    return await asyncio.wrap_future(_threads.submit(call))
