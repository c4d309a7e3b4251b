"""Checkpoints written while training goes on (--async-save)."""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from vime.errors import CheckpointError

_WRITE_TIMEOUT_S = 7200.0


class BackgroundSaves:
    """Writes one staged checkpoint at a time, in a thread. Built by every rank together.

    Its ranks speak over a gloo group that nothing else uses, so that they never meet training's
    collectives. The commit is the last thing that happens, once every rank has written.
    """

    def __init__(self) -> None:
        timeout = datetime.timedelta(seconds=_WRITE_TIMEOUT_S)
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def begin(self, write: Callable[[Any], None], commit: Callable[[], None], refused: str) -> None:
        """Starts `write(group)` on every rank, then `commit()` on rank 0.

        refused  what the error begins with when either fails
        Raises CheckpointError when the save before this one failed.
        """
        self.finish()
        arguments = (write, commit, refused)
        # A daemon: a run that is stopped does not wait, its last commit stays in force.
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True, name="save")
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save under way. Raises CheckpointError, on every rank, if it failed."""
        if self._thread is None:
            return
        self._thread.join(_WRITE_TIMEOUT_S)
        if self._thread.is_alive():
            raise CheckpointError(f"a checkpoint was not written in {_WRITE_TIMEOUT_S:.0f} s")
        self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise CheckpointError(problem)

    def _run(self, write: Callable[[Any], None], commit: Callable[[], None], refused: str) -> None:
        problem = self._attempt(lambda: write(self.group), refused)
        problems: list[str | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(problems, problem, group=self.group)
        problem = next((p for p in problems if p), None)
        if problem is None:
            verdict = [self._attempt(commit, refused) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(verdict, src=0, group=self.group)
            problem = verdict[0]
        if problem is not None:
            logging.getLogger(__name__).error("%s", problem)
        self._problem = problem

    @staticmethod
    def _attempt(action: Callable[[], None], refused: str) -> str | None:
        try:
            action()
        except Exception as error:
            return f"{refused}: {type(error).__name__}: {error}"
        return None
