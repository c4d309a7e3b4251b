"""One run: what the loops in `train.py` and `train_async.py` speak to. Ray lives behind it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray

from vime.backends.vllm.client import EngineClient
from vime.config import Config
from vime.config.view import resolved
from vime.errors import ConfigError, EngineError
from vime.observe import RunLog, Timers
from vime.platform import current
from vime.ray.placement_group import Placement, local_slots, place
from vime.ray.rollout import RolloutManager
from vime.ray.sharing import SharedGpus
from vime.ray.trainer import TrainerGroup
from vime.ray.wait import wait

_STOP_TIMEOUT_S = 90.0
_RESTARTS = 3  # of engines lost in one rollout or update, before the error is the run's

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Generation:
    """A rollout under way, or done."""

    rollout_id: int
    refs: list[ray.ObjectRef]  # batch, metrics


class Run:
    """The verbs of a training loop. `steps()` walks the rollouts and logs each as it is left."""

    def __init__(self, cfg: Config, placement: Placement, log: RunLog) -> None:
        self.cfg = cfg
        self.log = log
        self.metrics: dict[str, float] = {}
        self.timers = Timers()
        self.trainer = None if cfg.debug.rollout_only else TrainerGroup(cfg, placement)
        self.manager = ray.remote(RolloutManager).options(num_cpus=0).remote(cfg)
        self.gpus = SharedGpus(cfg, self._train, self.timers, on=current())
        engines = self.manager.start.remote(None if cfg.debug.no_engines else placement)
        if not cfg.debug.no_engines:
            count = cfg.cluster.num_engines
            log.starting(f"{count} vLLM engine{'s' if count > 1 else ''} (see {log.run_dir}/logs)")
        if self.gpus.engines_sleep:
            self._engines_started(engines)
        # Else engines and trainer start at the same time: each takes the better part of a minute.
        self.start_step = cfg.batch.start_rollout_id or 0
        if self.trainer:
            log.starting(f"the trainer on {cfg.cluster.trainer_gpus} ranks")
            self.start_step = self.trainer.start()
            self.gpus.trainer_started()
        if not self.gpus.engines_sleep:
            self._engines_started(engines)
        if self.start_step > 0 and (cfg.checkpoint.load or not cfg.debug.begins_anywhere):
            self._ask(self.manager.load.remote(self.start_step - 1), "the data state to be loaded")
        self.num_rollouts = self._num_rollouts()
        self.num_trained = self.start_step
        self._connect_engines()

    def _engines_started(self, urls: ray.ObjectRef) -> None:
        timeout_s = self.cfg.engine.start_timeout_s
        self.engine_urls = self._ask(urls, "engines and router to start", timeout_s)
        self.gpus.engines_started([EngineClient(u, who="the run") for u in self.engine_urls])

    def _connect_engines(self) -> None:
        if self.engine_urls and self.trainer:
            timeout_s = self.cfg.engine.weight_transfer_timeout_s
            self._train("connect_engines", self.engine_urls, timeout_s=timeout_s)

    def _ask(self, ref: ray.ObjectRef, what: str, timeout_s: float | None = None) -> Any:
        return wait(ref, what=what, timeout_s=timeout_s or self.cfg.engine.request_timeout_s)

    def _train(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        timeout_s = timeout_s or self.cfg.engine.request_timeout_s
        return self.trainer.call(method, *args, timeout_s=timeout_s)

    def _num_rollouts(self) -> int:
        batch = self.cfg.batch
        if batch.num_rollout is not None:
            return batch.num_rollout
        prompts = self._ask(self.manager.count_prompts.remote(), "the number of prompts", 600)
        return batch.rollouts(prompts)

    def steps(self) -> Iterator[int]:
        """The rollouts left to do. When the loop asks for the next, the last one is logged."""
        self.log.start(self.start_step, self.num_rollouts)
        if self.metrics:  # an evaluation before the first step
            self._log(self.start_step)
        for step in range(self.start_step, self.num_rollouts):
            started = time.perf_counter()
            yield step
            step_s = time.perf_counter() - started
            self.metrics |= {"perf/step_time": step_s, **self.timers.take()}
            self.metrics["perf/wait_time_ratio"] = self.metrics["perf/train_wait_time"] / step_s
            self._log(step + 1)
        if self.trainer is not None and self.cfg.checkpoint.async_save:
            self.log.phase("save")
            self._train("finish_saves")

    def _log(self, num_trained: int) -> None:
        self.log.step(num_trained, self.metrics)
        self.metrics = {}

    def due(self, interval: int | None, step: int) -> bool:
        """Every `interval` rollouts, and after the last."""
        if interval is None:
            return False
        return (step + 1) % interval == 0 or step + 1 == self.num_rollouts

    def start_generating(self, step: int) -> Generation:
        """Begins rollout `step` in the background."""
        return Generation(step, self.manager.generate.options(num_returns=2).remote(step))

    def finish(self, generation: Generation) -> Generation:
        """Waits until a rollout is complete. It is another one where engines were lost."""

        def complete() -> None:
            self._ask(generation.refs[1], f"rollout {generation.rollout_id}")

        def begin_again() -> None:
            nonlocal generation
            with suppress(EngineError):  # of an error that nobody sees Ray prints a traceback
                self._ask(generation.refs[0], "the rollout that failed")
            self.sync_weights()
            generation = self.start_generating(generation.rollout_id)

        with self.timers("train_wait"):
            self._without_lost_engines(complete, begin_again)
        return generation

    def generate(self, step: int) -> Generation:
        self.log.phase("generate")
        return self.finish(self.start_generating(step))

    def gpus_for_training(self) -> AbstractContextManager[None]:
        """Under --colocate the engines give up their memory inside; else nothing happens."""
        self._without_lost_engines(self.gpus.rest_engines)
        return self.gpus.for_training()

    def train(self, generation: Generation) -> None:
        """All optimizer steps of one rollout."""
        self.log.phase("train")
        batch, metrics = generation.refs
        self.metrics |= self._ask(metrics, "the rollout's metrics")
        if self.trainer is None:  # --debug-rollout-only
            return
        with self.timers("train"):
            self.metrics |= self._train("train", batch)
        self.num_trained = generation.rollout_id + 1

    def sync_weights(self) -> None:
        """Puts the trainer's weights into every engine, and makes sure that all have them."""
        if not self.engine_urls or self.trainer is None:
            return

        def update() -> None:
            self.log.phase("sync weights")
            timeout_s = self.cfg.engine.weight_transfer_timeout_s + 30
            with self.gpus.for_weight_update():
                self.metrics |= self._train("update_weights", self.num_trained, timeout_s=timeout_s)

        self._without_lost_engines(update)

    def evaluate(self, step: int) -> None:
        def scores() -> dict[str, float]:
            self.log.phase("evaluate")
            return self._ask(self.manager.evaluate.remote(step), "the evaluation")

        self.metrics |= self._without_lost_engines(scores, self.sync_weights)

    def _without_lost_engines(
        self, work: Callable[[], T], prepare: Callable[[], None] = lambda: None
    ) -> T:
        """What `work` gives. Under --use-fault-tolerance, where it fails because engines were lost,
        they are started again and it is repeated, after `prepare`."""
        for _ in range(_RESTARTS if self.cfg.engine.fault_tolerance else 0):
            try:
                return work()
            except EngineError:
                lost = self._ask(self.manager.lost_engines.remote(), "the engines to be checked")
                if not lost:
                    raise
            self._restart_engines(lost)
            prepare()
        return work()

    def _restart_engines(self, lost: list[int]) -> None:
        """Leaves engines and trainer as they are before a weight update."""
        self.log.phase("restart engines")
        self.gpus.room_for_engines()
        restarted = self.manager.restart_engines.remote(lost)
        timeout_s = self.cfg.engine.start_timeout_s + _STOP_TIMEOUT_S
        self._ask(restarted, "lost engines to start again", timeout_s)
        self.gpus.rest_engines()
        with self.gpus.for_training():
            pass  # the trainer comes back with its weights
        self._connect_engines()
        name = "rollout/engines_restarted"
        self.metrics[name] = self.metrics.get(name, 0) + len(lost)

    def save(self, step: int) -> None:
        """Commits a checkpoint: exports and data state, then weights; the tracker comes last."""
        if self.trainer is None:
            return
        self.log.phase("save")
        with self.timers("save"):
            if self.cfg.checkpoint.save_hf:
                self._train("save_hf", self.cfg.checkpoint.save_hf.format(rollout_id=step))
            if self.cfg.checkpoint.save:
                self.log.keep(step + 1, self.metrics)
                self._ask(self.manager.save.remote(step), "the data state to be saved")
                self._train("save", step)

    def stop(self) -> None:
        self._ask(self.manager.stop.remote(), "engines and router to stop", _STOP_TIMEOUT_S)


@contextmanager
def launch(cfg: Config) -> Iterator[Run]:
    """Starts Ray (or joins the cluster of RAY_ADDRESS), trainer and engines; ends all of it after.

    SIGTERM ends a run as Ctrl-C does, so that a scheduler's stop leaves no process behind.
    """
    flags = {name: value for name, value in resolved(cfg).items() if name != "vllm_api_key"}
    with RunLog(cfg.log, fallback_dir=cfg.checkpoint.save, config=flags) as log, _ray(cfg):
        cfg = replace(cfg, log=replace(cfg.log, run_dir=str(log.run_dir)))
        placement = place(cfg)
        run = Run(cfg, placement, log)
        try:
            yield run
        except BaseException:
            # A signal to the whole group may have ended the actors, and their engines, before.
            with suppress(Exception):
                run.stop()
            raise
        run.stop()


@contextmanager
def _ray(cfg: Config) -> Iterator[None]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    joining = "RAY_ADDRESS" in os.environ
    # Without RAY_ADDRESS a cluster of our own, whatever else runs on this machine.
    local: dict[str, Any] = {} if joining else {"address": "local", "include_dashboard": False}
    if not joining and not current().is_cuda:
        local["num_cpus"] = local_slots(cfg.cluster)
    ray.init(logging_level="ERROR", **local)
    signal.signal(signal.SIGTERM, _interrupt)  # after Ray has put its own handler there
    try:
        yield
    finally:
        ray.shutdown()


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def run_or_exit(loop: Callable[[Config], None], cfg: Config) -> None:
    """Runs a loop. What the user can act on ends as a message and an exit code, not as a traceback.

    2 a setting that cannot work; 130 interrupted; anything else is raised as it is.
    """
    try:
        loop(cfg)
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: every process of this run has been stopped", file=sys.stderr)
        sys.exit(130)
