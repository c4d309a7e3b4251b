"""Seconds by phase, added up over a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vime.observe.spans import span


class Timers:
    """Accumulates durations under names such as `perf/save_time`.

        with timers("save"):
            ...
        metrics = timers.take()  # {"perf/save_time": seconds}

    Durations of one name add up over a step. A block that raises an error counts, too. The timeline
    of the run gets the blocks as well.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = {}  # since the last `take`

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            with span(name.replace("_", " ")):
                yield
        finally:
            self.add(name, self._clock() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """{"perf/NAME_time": seconds} since the last call. Resets all durations."""
        taken, self.seconds = self.seconds, {}
        return {f"perf/{name}_time": seconds for name, seconds in taken.items()}
