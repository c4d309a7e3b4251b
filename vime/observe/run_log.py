"""The log of a run: metrics.jsonl, trackers and progress line behind one object."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from vime.observe import spans
from vime.observe.metrics import MetricsLog
from vime.observe.progress import Progress, clock_time
from vime.observe.trackers import make_trackers

logger = logging.getLogger(__name__)

DEFAULT_RUNS = "runs"  # the folder of runs without --run-dir and --save


class LogSettings(Protocol):
    """The flags for logging, with the names of the configuration's section `log`."""

    run_dir: str | None
    use_tensorboard: bool
    tb_dir: str | None
    use_wandb: bool
    wandb_project: str | None
    wandb_group: str | None
    progress: str
    timeline: bool


class RunLog:
    """Shows and saves the metrics of one run.

    settings      --run-dir, --use-tensorboard, --progress and so on
    fallback_dir  the run's folder without --run-dir; by default runs/DATE-TIME
    config        the flags of the run, for trackers

        with RunLog(cfg.log, fallback_dir=cfg.checkpoint.save) as log:
            log.starting("2 engines")
            log.start(start_step, num_rollouts)
            with log.phase("train"):
                ...
            log.step(num_trained, metrics)
    """

    def __init__(
        self,
        settings: LogSettings,
        *,
        fallback_dir: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._began = time.monotonic()
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.run_dir = Path(settings.run_dir or fallback_dir or f"{DEFAULT_RUNS}/{stamp}")
        self._settings = settings
        self._trackers = make_trackers(
            self.run_dir,
            use_tensorboard=settings.use_tensorboard,
            tb_dir=settings.tb_dir,
            use_wandb=settings.use_wandb,
            wandb_project=settings.wandb_project,
            wandb_group=settings.wandb_group,
            config=config,
        )
        self._metrics: MetricsLog | None = None
        self._progress: Progress | None = None

    def starting(self, what: str) -> None:
        """Prints what the run waits for, because a start may take minutes."""
        if self._settings.progress != "none":
            seconds = clock_time(time.monotonic() - self._began)
            print(f"{seconds}  starting {what}", flush=True)

    def start(self, start_step: int, num_rollouts: int) -> None:
        """Begins the log. `start_step` of `num_rollouts` rollouts are done already."""
        self._metrics = MetricsLog(self.run_dir, start_step=start_step, trackers=self._trackers)
        self._progress = Progress(num_rollouts, start=start_step, mode=self._settings.progress)
        self._progress.__enter__()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the loop, for the progress line and the timeline."""
        if self._progress is not None:
            self._progress.phase(name)
        with spans.span(name):
            yield

    def keep(self, num_trained: int, metrics: Mapping[str, Any]) -> None:
        """Saves a step's metrics before a checkpoint commits the step, in case of a kill."""
        if self._metrics is not None:
            self._metrics.keep(num_trained, metrics)

    def step(self, num_trained: int, metrics: Mapping[str, Any]) -> None:
        """Logs a step after `num_trained` rollouts. Raises RuntimeError before `start`."""
        if self._metrics is None or self._progress is None:
            raise RuntimeError("RunLog.step before RunLog.start")
        self._progress.update(num_trained, self._metrics.log(num_trained, metrics))

    def __enter__(self) -> RunLog:
        if self._settings.timeline:
            shutil.rmtree(self.run_dir / spans.FOLDER, ignore_errors=True)  # of an earlier run
            spans.record(self.run_dir, "loop")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._progress.__exit__(*exc)
        if self._metrics is not None:
            self._metrics.close()
        if self._settings.timeline:
            spans.stop()
            self._write_timeline()

    def _write_timeline(self) -> None:
        """A run does not fail because its timeline does."""
        from vime.observe.timeline import write_if_short

        try:
            written = write_if_short(self.run_dir)
        except Exception as error:
            logger.warning("no timeline: %s: %s", type(error).__name__, error)
        else:
            if self._settings.progress != "none":
                print(f"timeline: {written}", flush=True)
