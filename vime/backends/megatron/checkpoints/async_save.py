"""Checkpoints that are written while training continues (--async-save)."""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from vime.backends.megatron.checkpoints.agreement import agreed, named
from vime.errors import CheckpointError

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 7200.0


class BackgroundSaves:
    """Writes one checkpoint at a time, in a thread. All ranks build theirs together.

    The threads have their own gloo group, so their collectives never mix with training's.
    The commit comes last, after every rank has written.
    """

    def __init__(self) -> None:
        timeout = datetime.timedelta(seconds=WRITE_TIMEOUT_S)
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self._thread: threading.Thread | None = None
        self._problem: CheckpointError | None = None

    def begin(self, write: Callable[[Any], None], commit: Callable[[], None], refused: str) -> None:
        """Starts `write(group)` on every rank, then `commit()` on rank 0.

        refused  the first words of the error if a call fails
        Raises CheckpointError when the previous save failed.
        """
        self.finish()
        # A daemon thread: a stopped run does not wait for it, and the last commit stays in force.
        self._thread = threading.Thread(
            target=self._run, args=(write, commit, refused), daemon=True, name="save"
        )
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save in progress. Raises CheckpointError, on every rank, if it failed."""
        if self._thread is None:
            return
        self._thread.join(WRITE_TIMEOUT_S)
        if self._thread.is_alive():
            raise CheckpointError(f"a checkpoint was not written within {WRITE_TIMEOUT_S:.0f} s")
        self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _run(self, write: Callable[[Any], None], commit: Callable[[], None], refused: str) -> None:
        try:
            with named(refused):  # the agreement itself fails when another rank dies
                with agreed(refused, self.group):
                    write(self.group)
                with agreed(refused, self.group):
                    if dist.get_rank() == 0:
                        commit()
        except BaseException as error:  # a save counts as done only when nothing at all went wrong
            problem = error if isinstance(error, CheckpointError) else CheckpointError(str(error))
            log.error("%s", problem)
            self._problem = problem
