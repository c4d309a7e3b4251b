"""Failures of one rank that every rank must raise, because the others would wait for that rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from vime.errors import CheckpointError


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turns any failure inside into a CheckpointError that begins with `what`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


@contextmanager
def agreed(what: str, group: Any = None) -> Iterator[None]:
    """Like `named`, and every rank of the group raises if one rank fails. A collective.

    The body must hold no collective in which the other ranks would wait for the failed rank.
    """
    problem = None
    try:
        with named(what):
            yield
    except CheckpointError as error:
        problem = error
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, None if problem is None else str(problem), group=group)
    if problem is not None:
        raise problem
    if first := next((p for p in problems if p), None):
        raise CheckpointError(first)
