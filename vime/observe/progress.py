"""The progress line of a run: rollouts done, reward, scores, time left, seconds by phase."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from vime.observe.reading import LOSS, REWARD, eval_scores, phase_seconds

PLAIN_INTERVAL_S = 1.0  # minimum time between plain lines, except evaluations
ETA_WINDOW = 10  # the time left is computed from this number of steps


class Progress:
    """Shows a run of `num_rollouts` rollouts.

        with Progress(60, start=0, mode=cfg.log.progress) as progress:
            progress.phase("rollout")
            progress.update(num_trained, metrics)

    mode  "rich": a live line; "plain": a line per step; "none"; "auto": rich on a terminal
    """

    def __init__(
        self,
        num_rollouts: int,
        *,
        start: int = 0,
        mode: str = "auto",
        title: str = "rollout",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        if mode == "auto":
            mode = "rich" if self._stream.isatty() else "plain"
        self._mode = mode
        self._title = title
        self._num_rollouts = num_rollouts
        self._done = start
        self._clock = clock
        self._ends = deque([clock()], maxlen=ETA_WINDOW + 1)
        self._printed_at = float("-inf")
        self._phase = "starting"
        self._result = ""
        self._times = ""
        self._score = ""
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._mode == "rich":
            console = Console(file=self._stream)
            self._live = Live(self._render(), console=console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._phase = "stopped" if any(exc) else "done"
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    def phase(self, name: str) -> None:
        """Sets the phase ("rollout", "train", "eval", ...). Only the live line shows it."""
        self._phase = name
        if self._live is not None:
            self._live.update(self._render())

    def update(self, num_trained: int, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a finished step, after which `num_trained` rollouts are trained."""
        now = self._clock()
        if num_trained <= self._done:  # an evaluation before training; the clock starts after it
            self._ends[-1] = now
        else:
            self._ends.append(now)
            self._done = num_trained
        scores = eval_scores(metrics)
        if scores:
            self._score = "  ".join(f"{name} {score:.3f}" for name, score in scores.items())
        self._result = result(metrics) or self._result
        self._times = times(metrics)
        if self._live is not None:
            self._live.update(self._render())
        due = bool(scores) or self._done == self._num_rollouts
        if self._mode == "plain" and (due or now - self._printed_at >= PLAIN_INTERVAL_S):
            self._printed_at = now
            shown = self._score if scores else ""
            parts = [f"{self._title} {self._done}/{self._num_rollouts}", result(metrics)]
            parts += [f"eval {shown}" if shown else "", f"left {self._time_left()}", self._times]
            print("  ".join(p for p in parts if p), file=self._stream, flush=True)

    def _time_left(self) -> str:
        if len(self._ends) < 2:
            return "?"
        per_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return clock_time(per_step * (self._num_rollouts - self._done))

    def _render(self) -> Group:
        """The most important values are on the left: a narrow terminal cuts off the right end."""
        running = self._phase not in ("done", "stopped")
        bar = ProgressBar(total=max(1, self._num_rollouts), completed=self._done, width=12)
        cells: list[Any] = [
            Spinner("dots") if running else "●",
            f"{self._title} {self._done}/{self._num_rollouts}",
            bar,
            *(w for w in (self._result, f"[bold]{self._score}[/bold]" if self._score else "") if w),
            f"left {self._time_left()}",
            f"[dim]{self._phase}[/dim]",
        ]
        line = Table.grid(padding=(0, 1))
        for _ in cells:
            line.add_column(no_wrap=True, overflow="crop")
        line.add_row(*cells)
        return Group(line, Text(f"  {self._times}", style="dim", no_wrap=True, overflow="crop"))


def result(metrics: Mapping[str, Any]) -> str:
    """The reward; the loss if there is no reward."""
    if isinstance(reward := metrics.get(REWARD), (int, float)):
        return f"reward {reward:.3f}"
    if isinstance(loss := metrics.get(LOSS), (int, float)):
        return f"loss {loss:.3f}"
    return ""


def times(metrics: Mapping[str, Any]) -> str:
    """Seconds by phase, in one short text."""
    seconds = {p: s for p, s in phase_seconds(metrics).items() if s >= 0.05}
    return " ".join(f"{phase} {s:.1f}s" for phase, s in seconds.items())


def clock_time(seconds: float) -> str:
    """8 -> "0:08", 3725 -> "1:02:05"."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
