"""metrics.jsonl: one JSON object per step, flushed so that a killed run keeps its metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vime.files import write_text
from vime.observe.trackers import Tracker

FILE_NAME = "metrics.jsonl"
NEXT = ".next"  # the suffix of the file with the step that is being committed


class MetricsLog:
    """Writes a run's metrics, one object per step, and passes them to the trackers.

    run_dir     folder of metrics.jsonl; made if missing
    start_step  number of rollouts trained before this process began. 0 empties the file. A run that
                resumes keeps the lines up to `start_step` and removes later lines, which came after
                its checkpoint. So no step appears twice
    trackers    get the same numbers

    The step of a line is the number of rollouts trained so far. Step 0 is the evaluation before
    training.
    """

    def __init__(
        self, run_dir: str | Path, *, start_step: int = 0, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _steps_until(self.path, start_step) if start_step else []
        if start_step and (not kept or kept[-1]["step"] < start_step):
            kept += [r for r in _read_next(self.path) if r["step"] == start_step]
        # A run that resumes may log its first step again, after a weight sync or an evaluation. The
        # line of that step waits, so that these metrics can be added.
        self._resumed = kept.pop() if kept and kept[-1]["step"] == start_step else None
        write_text(self.path, _as_lines(kept))
        self._last_step = kept[-1]["step"] if kept else -1
        self._trackers = tuple(trackers)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one step. Returns the object that it wrote.

        Numbers (Python, numpy or 0-d tensors) become floats or ints. JSON has no NaN and no
        infinity: such a value becomes null, and "non_finite" lists its name. Raises ValueError when
        `step` is not above the last step.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} logged after step {self._last_step} in {self.path}")
        record = as_record(step, metrics)
        if self._resumed is not None:
            held, self._resumed = self._resumed, None
            if held["step"] == step:
                record = {**record, **held}
            else:
                self._write(held)
        self._write(record)
        numbers = {k: v for k, v in record.items() if "/" in k and isinstance(v, (int, float))}
        for tracker in self._trackers:
            tracker.log(step, numbers)
        return record

    def keep(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Saves the metrics of a step before a checkpoint commits it.

        A run that is killed between the commit and `log` resumes after this step, and takes the
        step's line from here.
        """
        write_text(self.path.with_suffix(NEXT), _as_lines([as_record(step, metrics)]))

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = record["step"]

    def close(self) -> None:
        if self._resumed is not None:
            self._write(self._resumed)
            self._resumed = None
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def as_record(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The object of a step: {"step", "time" (Unix seconds), metrics, "non_finite" if needed}."""
    record: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
    non_finite = {}
    for name, value in metrics.items():
        value = _plain(value)
        if isinstance(value, float) and not math.isfinite(value):
            non_finite[name] = str(value)
            value = None
        record[name] = value
    if non_finite:
        record["non_finite"] = non_finite
    return record


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in order. `path` is the file or its folder.

    Leaves out a last line that a crash cut off. Raises ValueError on any other bad line.
    """
    path = Path(path)
    return list(_read(path / FILE_NAME if path.is_dir() else path))


def _read(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        yield record


def _steps_until(path: Path, last_step: int) -> list[dict[str, Any]]:
    return [r for r in _read(path) if r["step"] <= last_step] if path.exists() else []


def _read_next(path: Path) -> list[dict[str, Any]]:
    following = path.with_suffix(NEXT)
    return list(_read(following)) if following.exists() else []


def _as_lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(r) + "\n" for r in records)


def _plain(value: Any) -> Any:
    """A value that JSON can write. 0-d arrays and tensors give their item, others their text."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
