"""Wait for Ray with a deadline, and show the stacks of processes that hang."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

_POLL_S = 5.0


def wait_all(refs: Sequence[ray.ObjectRef], *, what: str, timeout_s: float) -> list[Any]:
    """The values of `refs`. Raises the first failure as soon as it happens.

    After one rank has crashed the others hang in a collective, so waiting in order would hide the
    crash. Raises TimeoutError, which names `what`, after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    pending = list(refs)
    while pending:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(
                f"waited {timeout_s:.0f} s for {what}: {len(pending)} of {len(refs)} did not "
                "finish. Their stacks are in the log above."
            )
        done, pending = ray.wait(pending, num_returns=1, timeout=min(left, _POLL_S))
        for ref in done:
            ray.get(ref)
    return ray.get(list(refs))


def wait(ref: ray.ObjectRef, *, what: str, timeout_s: float) -> Any:
    return wait_all([ref], what=what, timeout_s=timeout_s)[0]


@contextmanager
def stacks_if_longer_than(timeout_s: float) -> Iterator[None]:
    """Print the stack of every thread here if the block takes longer than `timeout_s`."""
    faulthandler.dump_traceback_later(timeout_s, exit=False, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
