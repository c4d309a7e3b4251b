"""Calls that run at the same time: engines must receive while the trainer sends."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from vime.errors import EngineError

T = TypeVar("T")


def run_together(calls: Sequence[Callable[[], Any]], timeout_s: float, what: str) -> list[Any]:
    """Run each call in its own thread. Returns the results in order.

    The first failure is raised at once, even if other calls still wait for the failed one; their
    threads end at their own deadlines. Raises EngineError after `timeout_s`.
    """
    done: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue()

    def run(i: int) -> None:
        try:
            done.put((i, calls[i](), None))
        except BaseException as error:
            done.put((i, None, error))

    for i in range(len(calls)):
        threading.Thread(target=run, args=(i,), daemon=True, name=f"{what} {i}").start()
    results: list[Any] = [None] * len(calls)
    deadline = time.monotonic() + timeout_s
    for finished in range(len(calls)):
        try:
            i, result, error = done.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise EngineError(
                f"{what}: {len(calls) - finished} of {len(calls)} calls did not return within "
                f"{timeout_s:.0f} s; --vllm-weight-transfer-timeout-sec raises the deadline"
            ) from None
        if error is not None:
            raise error
        results[i] = result
    return results


def call_each(
    clients: Sequence[T], call: Callable[[T], Any], timeout_s: float, what: str
) -> list[Any]:
    """`run_together` for the same call to every engine."""
    return run_together([partial(call, client) for client in clients], timeout_s, what)


class InFlight:
    """At most one call in the background: the next bucket is gathered while this one travels."""

    def __init__(self) -> None:
        self._future: Future | None = None

    def start(self, call: Callable[[], Any], name: str) -> None:
        assert self._future is None, "wait comes before the next start"
        self._future = future = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True, name=name).start()

    def wait(self) -> None:
        """Returns when the call has ended. Raises its error. The call has its own deadline."""
        future, self._future = self._future, None
        if future is not None:
            future.result()
