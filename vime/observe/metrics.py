"""metrics.jsonl: one JSON object per step, flushed, so that a killed run keeps its past."""

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
NEXT = ".next"  # in place of .jsonl: the line of a step that is being committed


class MetricsLog:
    """Writes a run's metrics, one object per step, and passes them to the trackers.

    run_dir     folder of metrics.jsonl; made if missing
    start_step  rollouts trained before this process began. 0 empties the file; a run that resumes
                keeps the lines up to `start_step` and drops the later ones, which were logged
                after the checkpoint that it resumes from: no step appears twice
    trackers    fed with the same numbers

    A step is the number of rollouts trained when its line is written; step 0 holds the evaluation
    before any training.
    """

    def __init__(
        self, run_dir: str | Path, *, start_step: int = 0, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _steps_until(self.path, start_step) if start_step else []
        if start_step and (not kept or kept[-1]["step"] < start_step):
            kept += [r for r in _read_next(self.path) if r["step"] == start_step]
        # A run that resumes may log its first step again (its first weight sync, an evaluation):
        # that line is held back and gains what it lacks.
        self._resumed = kept.pop() if kept and kept[-1]["step"] == start_step else None
        write_text(self.path, _as_lines(kept))
        self._last_step = kept[-1]["step"] if kept else -1
        self._trackers = tuple(trackers)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append one step and return the object written.

        Numbers (Python, numpy or 0-d tensors) become floats or ints; JSON knows no NaN or infinity,
        so such a value is null and its name is listed under "non_finite". Raises ValueError when
        `step` is not above the last one logged.
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
        """Sets aside what is known of a step before a checkpoint commits it.

        A run that is killed between the commit and `log` resumes behind the step, and takes its
        line from here.
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
    """The object of one step: {"step", "time" (Unix seconds), metrics, "non_finite" if any}."""
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
    """The objects of a metrics.jsonl (or of a folder that holds one), in order.

    A last line that a crash cut short is left out. Raises ValueError for any other bad line.
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
    """A number, string, bool or None that JSON takes; 0-d arrays and tensors give their item."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
