"""Threads for users' plain functions, which may block. Nothing waits for these threads.

With asyncio's own threads, a rollout and the process could not end before every call has returned.
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

NUM_THREADS = 32  # calls at a time, including calls past their deadline; other calls wait


class DaemonThreads:
    """At most `limit` threads. They start when needed and end with the process."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._calls: SimpleQueue[tuple[Future, Callable[[], Any]]] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._num_threads = 0

    def submit(self, call: Callable[[], Any]) -> Future:
        """The future result of `call()`. A call that is cancelled before its turn never starts."""
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
    """The function's result. If the caller is cancelled, the call continues in its thread."""
    call = partial(contextvars.copy_context().run, function, *args, **kwargs)
    return await asyncio.wrap_future(_threads.submit(call))
