"""A progress bar for bytes: live on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_EVERY_S = 5.0


class ByteBar:
    """Shows the progress through `total` bytes.

        with ByteBar("writing", total) as bar:
            bar.add(tensor.nbytes)

    shown  False on ranks that print nothing
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.done = title, total, 0
        self._stream = stream or sys.stdout
        self._clock = clock
        self._started = self._printed = clock()
        self._shown = shown
        self._live: Progress | None = None
        if shown and self._stream.isatty():
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            console = Console(file=self._stream)
            self._live = Progress(TextColumn("{task.description}"), *columns, console=console)
            self._task = self._live.add_task(title, total=total)

    def __enter__(self) -> ByteBar:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, num_bytes: int) -> None:
        """Adds `num_bytes` to the bytes that are done."""
        self.done += num_bytes
        if self._live is not None:
            self._live.update(self._task, completed=self.done)
            return
        now = self._clock()
        if self._shown and now - self._printed >= LINE_EVERY_S:
            self._printed = now
            left_s = (now - self._started) * (self.total / self.done - 1)
            share = f"{self.done / self.total:.0%} of {self.total / 1e9:.2f} GB"
            print(f"{self.title}: {share}, {left_s:.0f} s left", file=self._stream, flush=True)
