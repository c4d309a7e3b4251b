"""Draws the timeline of a run: a row for each track, with bars of its work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vime.observe.plot import INK, MUTED, plain
from vime.observe.tracks import STEP, Span, by_track, in_progress, kind_of

MOST_ROWS = 16  # of trainers, and of engines; timeline.json has all
LABEL = 0.035  # the width of a step's label, as a share of the picture's
WAIT = "wait"

# kind of work: (its colour, the names of its spans)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "generate": ("#3d7ea6", ("generate",)),
    "grade": ("#e08e45", ("grade", "judge")),
    "batching": ("#d9b310", ("batching",)),
    "log-probs": (
        "#8cc084",
        ("log probs", "ref log probs", "teacher log probs", "values"),
    ),
    "train": ("#0b6e4f", ("train", "actor train", "critic train")),
    "update weights": (
        "#b3322c",
        ("update weights", "sync weights", "pause", "send", "finish", "resume"),
    ),
    "evaluate": ("#5b3fa0", ("evaluate",)),
    "save": ("#7a5230", ("save", "save hf", "finish saves")),
    "move memory": ("#4fb3bf", ("sleep", "wake up", "offload", "onload", "free cache")),
    "start": ("#9fb3c8", ("start", "connect engines", "restart engines")),
    WAIT: ("#e4e7eb", ("wait for groups", "train wait", "eval wait", "suspend")),
}
OTHER = "#52606d"
KIND_OF = {name: kind for kind, (_, names) in KINDS.items() for name in names}
WHOLE_ENGINE = ("update weights",)  # not a request: nothing is generated meanwhile


def plot_timeline(spans: Sequence[Span], path: str | Path, *, began: int | None = None) -> Path:
    """Draws spans as a PNG. Returns `path`.

    Where work overlaps, as the requests of an engine do, the height is their number. On the right
    is the share of the time in which a track worked.

    began  the time that counts as 0, in microseconds (default: of the first span)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    began = spans[0].began if began is None else began
    end = max(span.ended for span in spans)
    tracks = {t: own for t, own in by_track(spans).items() if kind_of(t)[1] < MOST_ROWS}
    figure = Figure(figsize=(14, 1.5 + 0.42 * len(tracks)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    first = min(span.began for span in spans)
    steps = [span for span in tracks.get("loop", ()) if span.name == STEP]
    used: set[str] = set()
    for row, (track, own) in enumerate(tracks.items()):
        draw = _draw_overlaps if own[0].overlaps else _draw_bars
        used |= draw(axes, row, own, began)
        if track != "loop":
            share = _busy(own) / max(1, end - first)
            axes.annotate(
                f"{share:.0%}", (1.005, row), xycoords=("axes fraction", "data"), va="center",
                color=MUTED, fontsize=8, annotation_clip=False,
            )  # fmt: skip
    _draw_steps(axes, steps, began, LABEL * (end - first))
    axes.set_yticks(range(len(tracks)), [_label(t, own) for t, own in tracks.items()], fontsize=8)
    axes.set_ylim(len(tracks) - 0.5, -0.6)
    axes.set_xlim(_seconds(first, began), _seconds(end, began))
    axes.set_xlabel("seconds", color=INK, fontsize=9)
    _legend(axes, used)
    plain(axes)
    axes.grid(visible=False)
    axes.tick_params(colors=INK, labelsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_steps(axes: Any, steps: Iterable[Span], began: int, apart: float) -> None:
    """A line at the beginning of each step, and labels that are `apart` microseconds apart."""
    last = -math.inf
    for step in steps:
        x = _seconds(step.began, began)
        axes.axvline(x, color=MUTED, linewidth=0.5, zorder=1)
        if step.began - last >= apart:
            last = step.began
            axes.annotate(
                f"step {step.args.get('step', '')}", (x, -0.55), (2, 0), va="bottom",
                textcoords="offset points", color=MUTED, fontsize=7, annotation_clip=False,
            )  # fmt: skip


def _draw_bars(axes: Any, row: int, spans: Iterable[Span], began: int, zorder: int = 2) -> set[str]:
    """Inner spans are drawn over the spans that contain them. Returns the kinds drawn."""
    used = set()
    bars: list[tuple[float, float]] = []
    colors: list[str] = []
    for span in spans:
        if span.name == STEP:
            continue
        kind = KIND_OF.get(span.name)
        used.add(kind or "other")
        bars.append((_seconds(span.began, began), (span.ended - span.began) / 1e6))
        colors.append(KINDS[kind][0] if kind else OTHER)
    axes.broken_barh(bars, (row - 0.36, 0.72), facecolors=colors, linewidth=0, zorder=zorder)
    return used


def _draw_overlaps(axes: Any, row: int, spans: Sequence[Span], began: int) -> set[str]:
    """One area for each kind of work, on top of each other, and bars for the whole engine."""
    most = max(1, _most(spans))
    work = [(KIND_OF.get(span.name, "other"), span) for span in _requests(spans)]
    kinds = list(dict.fromkeys(kind for kind, _ in work))
    for i, kind in enumerate(kinds):  # each area covers the lower part of the one before
        counts = in_progress(span for k, span in work if k in kinds[i:])
        x = [_seconds(time, began) for time, _ in counts]
        y = [row + 0.36 - 0.72 * count / most for _, count in counts]
        color = KINDS[kind][0] if kind in KINDS else OTHER
        axes.fill_between(x, y, row + 0.36, step="post", color=color, linewidth=0, zorder=2 + i)
    apart = [span for span in spans if span.name in WHOLE_ENGINE]
    return {*kinds, *_draw_bars(axes, row, apart, began, zorder=2 + len(kinds))}


def _requests(spans: Iterable[Span]) -> list[Span]:
    return [span for span in spans if span.name not in WHOLE_ENGINE]


def _most(spans: Iterable[Span]) -> int:
    return max((count for _, count in in_progress(_requests(spans))), default=0)


def _busy(spans: Iterable[Span]) -> int:
    """Microseconds in which a track does anything but wait."""
    waits = KINDS[WAIT][1]
    counts = in_progress(s for s in spans if s.name not in waits)
    pairs = zip(counts, counts[1:], strict=False)
    return sum(after - time for (time, count), (after, _) in pairs if count)


def _label(track: str, spans: Sequence[Span]) -> str:
    return f"{track} (up to {_most(spans)})" if spans[0].overlaps else track


def _legend(axes: Any, used: set[str]) -> None:
    from matplotlib.patches import Patch

    shown = [(kind, color) for kind, (color, _) in KINDS.items() if kind in used]
    shown += [("other", OTHER)] * ("other" in used)
    axes.legend(
        [Patch(color=color) for _, color in shown], [kind for kind, _ in shown], ncols=len(shown),
        loc="lower left", bbox_to_anchor=(0, 1.02), frameon=False, fontsize=8, handlelength=1.2,
    )  # fmt: skip


def _seconds(time: int, began: int) -> float:
    return (time - began) / 1e6
