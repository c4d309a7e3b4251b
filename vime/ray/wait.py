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
_MOST_NAMED = 8


def wait_all(
    refs: Sequence[ray.ObjectRef],
    *,
    what: str,
    timeout_s: float,
    names: Sequence[str] | None = None,
) -> list[Any]:
    """The values of `refs`. Raises the first failure as soon as it happens.

    names  for the error, of the process behind each ref, with its node

    After one rank has crashed the others hang in a collective, so waiting in order would hide the
    crash. Raises TimeoutError, which names `what` and the processes that are late, after
    `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    pending = list(refs)
    while pending:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(
                f"waited {timeout_s:.0f} s for {what}: {len(pending)} of {len(refs)} did not "
                f"finish{_late(refs, pending, names)}. Their stacks are in the log above."
            )
        done, pending = ray.wait(pending, num_returns=1, timeout=min(left, _POLL_S))
        for ref in done:
            ray.get(ref)
    return ray.get(list(refs))


def _late(refs: Sequence[Any], pending: Sequence[Any], names: Sequence[str] | None) -> str:
    """The names of the pending refs, in their order: " (rank 2 on 10.0.0.2, ...)"."""
    if names is None:
        return ""
    late = [name for ref, name in zip(refs, names, strict=True) if ref in pending]
    more = ", ..." if len(late) > _MOST_NAMED else ""
    return f" ({', '.join(late[:_MOST_NAMED])}{more})"


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
