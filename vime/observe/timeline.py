"""Joins the spans of all processes of a run: timeline.json for Perfetto, and timeline.png.

    python -m vime.observe.timeline RUN_DIR [START END]

A run with --timeline does this at its end. The command works during a run and after a crash, too.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vime.files import written_whole
from vime.observe.spans import FOLDER
from vime.observe.timeline_plot import plot_timeline
from vime.observe.tracks import STEP, Span, between, by_track, in_progress, lanes, read_spans

MOST_BYTES = 32 << 20  # of spans; some 230,000, which take 20 s
USAGE = """\
usage: python -m vime.observe.timeline RUN_DIR [START END]

Writes RUN_DIR/timeline.json and timeline.png, of the whole run or of the seconds START to END."""


def chrome_events(spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    """The events of Chrome's trace format: a process for each track, a thread for each lane.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    first = spans[0].began
    for pid, (track, own) in enumerate(by_track(spans).items()):
        placed = lanes(own)
        yield _named("process_name", track, pid)
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        for lane in range(max(placed) + 1):
            yield _named(
                "thread_name", f"lane {lane}" if lane or own[0].overlaps else track, pid, lane
            )
        for span, lane in zip(own, placed, strict=True):
            yield {
                "ph": "X",
                "name": span.name,
                "ts": span.began - first,
                "dur": span.ended - span.began,
                "pid": pid,
                "tid": lane,
                "args": span.args,
            }
        if own[0].overlaps:
            for time, count in in_progress(own):
                event = {"ph": "C", "name": "in progress", "ts": time - first, "pid": pid}
                yield event | {"args": {"number": count}}


def _named(what: str, name: str, pid: int, tid: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def write_trace(spans: Sequence[Span], path: Path) -> Path:
    """Writes a Chrome trace. https://ui.perfetto.dev opens it."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator, events = "", chrome_events(spans)
        while some := list(islice(events, 1000)):
            file.write(separator + json.dumps(some)[1:-1])
            separator = ",\n"
        file.write("\n]}\n")
    return path


def write_timeline(run_dir: Path, seconds: Sequence[float] = ()) -> list[Path]:
    """Writes both files, or only the trace if matplotlib is missing. Returns their paths.

    seconds  (start, end) of a part of the run; empty: all of it, but the picture leaves out the
             start of the engines, which may take longer than many steps
    Raises ValueError if there are no spans.
    """
    spans = read_spans(run_dir)
    began = spans[0].began
    if seconds and not (spans := between(spans, *seconds)):
        raise ValueError(f"no spans between the seconds {seconds[0]:g} and {seconds[1]:g}")
    written = [write_trace(spans, run_dir / "timeline.json")]
    if importlib.util.find_spec("matplotlib"):
        shown = spans if seconds else from_first_step(spans)
        written.append(plot_timeline(shown, run_dir / "timeline.png", began=began))
    return written


def from_first_step(spans: list[Span]) -> list[Span]:
    """The spans, cut at the first step. All of them if there is no step."""
    first = next((span.began for span in spans if span.name == STEP), spans[0].began)
    return between(spans, (first - spans[0].began) / 1e6, math.inf)


def write_if_short(run_dir: Path) -> str:
    """Writes both files at the end of a run, unless that takes minutes. Returns a message."""
    folder = run_dir / FOLDER
    size = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    if size > MOST_BYTES:
        command = f"python -m vime.observe.timeline {run_dir} START END"
        return f"{size >> 20} MiB of spans in {folder}; {command} shows the seconds START to END"
    return ", ".join(map(str, write_timeline(run_dir)))


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if len(words) not in (1, 3) or words[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        written = write_timeline(Path(words[0]), [float(word) for word in words[1:]])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
