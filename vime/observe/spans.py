"""Records when a process works, and on what, for the timeline of a run (--timeline).

    with span("batching", rollout=3):
        ...

Without `record`, nothing is recorded. `vime/observe/timeline.py` reads the files.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER = "timeline"  # in the run's folder: PROCESS.jsonl of each process
FLUSH_S = 1.0  # a process that is killed loses the spans of this time
now = time.perf_counter
_encode = json.JSONEncoder(default=str, check_circular=False).encode


class Recorder:
    """Writes spans to a file. A thread writes, so that a span costs no file access.

    A line is a JSON array of spans, because json takes half as long for a list as for its items.

    Times are microseconds of the wall clock, so that files of several processes fit together. The
    wall clock is read once: spans do not jump when it is corrected.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._spans: deque[tuple] = deque()
        self._offset = time.time() - now()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._flush_regularly, name="timeline", daemon=True).start()

    def add(self, *span: Any) -> None:
        self._spans.append(span)

    def flush(self) -> None:
        """Writes all spans so far. A run does not end because its timeline cannot be written."""
        with self._writing:
            found = [self._object(*self._spans.popleft()) for _ in range(len(self._spans))]
            if not found or self._file.closed:
                return
            try:
                self._file.write(_encode(found) + "\n")
                self._file.flush()
            except OSError as error:
                logger.warning("the timeline ends here: %s", error)
                self._file.close()

    def close(self) -> None:
        self._closed.set()
        self.flush()
        with self._writing:
            self._file.close()

    def _flush_regularly(self) -> None:
        while not self._closed.wait(FLUSH_S):
            self.flush()

    def _object(
        self, name: str, track: str | None, args: dict[str, Any], began: float, ended: float
    ) -> dict[str, Any]:
        # Both ends are rounded, not the duration: then spans that touch or nest still do.
        first, last = round(1e6 * (began + self._offset)), round(1e6 * (ended + self._offset))
        span: dict[str, Any] = {"name": name, "ts": first, "dur": last - first}
        if track is not None:
            span["track"] = track
        if args:
            span["args"] = args
        return span


_recorder: Recorder | None = None
_NOTHING = nullcontext()


def record(run_dir: str | Path, process: str) -> None:
    """Record the spans of this process from now on, under its name: "trainer-0"."""
    global _recorder
    stop()
    _recorder = Recorder(Path(run_dir) / FOLDER / f"{process}.jsonl")


def recording() -> bool:
    return _recorder is not None


def flush() -> None:
    """Writes the spans so far: before this process may be killed, or before somebody reads them."""
    if _recorder is not None:
        _recorder.flush()


def stop() -> None:
    """Ends the recording."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder is not None:
        recorder.close()


def span(name: str, track: str | None = None, **args: Any) -> AbstractContextManager[None]:
    """The time of the block.

    track  of work that overlaps other work of this track, such as the requests of "engine 0".
           None: the process's own track, in which a span may contain others
    args   the subject of the work
    """
    return _NOTHING if _recorder is None else _Timed(name, track, args)


class _Timed(AbstractContextManager[None]):
    """A class, because a generator would take twice as long."""

    __slots__ = ("began", "subject")

    def __init__(self, *subject: Any) -> None:
        self.subject = subject

    def __enter__(self) -> None:
        self.began = now()

    def __exit__(self, *exc: object) -> None:
        if _recorder is not None:
            _recorder.add(*self.subject, self.began, now())


def add(name: str, began: float, track: str | None = None, **args: Any) -> None:
    """A span from `began`, an earlier value of `now()`, until now."""
    if _recorder is not None:
        _recorder.add(name, track, args, began, now())
