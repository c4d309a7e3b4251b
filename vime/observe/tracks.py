"""Reads the spans of a run, and places them: tracks, and lanes within a track."""

from __future__ import annotations

import heapq
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vime.observe.spans import FOLDER

STEP = "step"  # the span of the loop that contains a step
TRACKS = (
    "loop",
    "manager",
    "evaluations",
    "trainer",
    "engine",
    "graders",
    "teacher",
    "groups",
)  # from the top


@dataclass(frozen=True, slots=True)
class Span:
    """Work from `began` to `ended`, in microseconds of the wall clock.

    overlaps  whether work of this track overlaps other work of it
    """

    name: str
    track: str
    began: int
    ended: int
    overlaps: bool = False
    args: dict[str, Any] = field(default_factory=dict)


def read_spans(run_dir: str | Path) -> list[Span]:
    """All spans of a run, by time. Raises ValueError if there are none, or at a damaged line."""
    spans = []
    for path in sorted((Path(run_dir) / FOLDER).glob("*.jsonl")):
        own = path.stem.replace("-", " ")
        for s in _objects(path):
            began, track = s["ts"], s.get("track")
            ended, overlaps = began + s["dur"], track is not None
            spans.append(Span(s["name"], track or own, began, ended, overlaps, s.get("args", {})))
    if not spans:
        raise ValueError(f"no spans in {Path(run_dir) / FOLDER}: was the run started --timeline?")
    return sorted(spans, key=lambda span: (span.began, -span.ended))


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """A process that was killed may leave half a line at the end."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield from json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: {error}") from None


def by_track(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """{track: its spans}, in the order of TRACKS, then by number."""
    tracks: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        tracks[span.track].append(span)

    def order(track: str) -> tuple:
        kind, number = kind_of(track)
        return TRACKS.index(kind) if kind in TRACKS else len(TRACKS), kind, number

    return {track: tracks[track] for track in sorted(tracks, key=order)}


def kind_of(track: str) -> tuple[str, int]:
    """ "engine 12" -> ("engine", 12)."""
    found = re.fullmatch(r"(.+?) (\d+)", track)
    return (found[1], int(found[2])) if found else (track, 0)


def lanes(spans: Sequence[Span]) -> list[int]:
    """A lane for each span of a track; `spans` by time.

    Spans of one lane follow each other. In a process's own track they may also contain each other.
    """
    return _lanes_of_overlaps(spans) if spans[0].overlaps else _lanes_of_nests(spans)


def _lanes_of_overlaps(spans: Sequence[Span]) -> list[int]:
    """Each span gets the lowest lane that is free."""
    found: list[int] = []
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (end, lane)
    for span in spans:
        while busy and busy[0][0] <= span.began:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (span.ended, lane))
        found.append(lane)
    return found


def _lanes_of_nests(spans: Sequence[Span]) -> list[int]:
    """Threads of a process get further lanes when their work crosses."""
    found: list[int] = []
    open_ends: list[list[int]] = []  # of each lane
    for span in spans:
        for ends in open_ends:
            while ends and ends[-1] <= span.began:
                ends.pop()
        fits = (i for i, ends in enumerate(open_ends) if not ends or span.ended <= ends[-1])
        lane = next(fits, len(open_ends))
        if lane == len(open_ends):
            open_ends.append([])
        open_ends[lane].append(span.ended)
        found.append(lane)
    return found


def in_progress(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """[(time, number of spans that are open from then on)]."""
    changes: dict[int, int] = defaultdict(int)
    for span in spans:
        changes[span.began] += 1
        changes[span.ended] -= 1
    counts, count = [], 0
    for time in sorted(changes):
        count += changes[time]
        counts.append((time, count))
    return counts


def between(spans: Iterable[Span], start_s: float, end_s: float) -> list[Span]:
    """The parts of spans between two times, in seconds from the first span."""
    spans = list(spans)
    first = spans[0].began
    low = first + round(1e6 * start_s)
    high = math.inf if math.isinf(end_s) else first + round(1e6 * end_s)
    return [
        Span(s.name, s.track, max(s.began, low), min(s.ended, high), s.overlaps, s.args)
        for s in spans
        if s.began < high and s.ended > low
    ]
