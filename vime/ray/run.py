"""One run, as the loops in `train.py` and `train_async.py` use it. The loops never see Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from vime.backends.megatron.checkpoints.commit import begin_save
from vime.backends.vllm.client import EngineClient
from vime.config import Config
from vime.errors import EngineError
from vime.observe import RunLog, Timers
from vime.observe.spans import span
from vime.platform import current
from vime.ray.environment import remote
from vime.ray.placement_group import Placement
from vime.ray.rollout import RolloutManager
from vime.ray.sharing import SharedGpus
from vime.ray.trainer import TrainerGroup
from vime.ray.wait import wait

_STOP_TIMEOUT_S = 90.0
_RESTARTS = 3  # how often engines may be lost in one rollout or update before the run ends

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RolloutHandle:
    """A rollout that is being generated, or is complete."""

    rollout_id: int
    metrics: ray.ObjectRef
    parts: list[ray.ObjectRef]  # of the batch, by data-parallel rank

    def silence(self) -> None:
        """Retrieves the error of a rollout that failed; otherwise Ray prints it for each part."""
        for ref in self.parts:
            with suppress(Exception):
                ray.get(ref, timeout=0)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation after rollout `step`, which runs or is complete."""

    step: int
    scores: ray.ObjectRef


class Run:
    """The actions of a training loop. `steps()` yields the rollouts and logs each after it ends."""

    def __init__(self, cfg: Config, placement: Placement, log: RunLog) -> None:
        self.cfg = cfg
        self.log = log
        self.metrics: dict[str, float] = {}
        self.timers = Timers()
        self.trainer = None if cfg.debug.rollout_only else TrainerGroup(cfg, placement)
        options = placement.manager_options
        if cfg.rollout.fully_async:
            options["max_concurrency"] = 2  # an evaluation runs beside the rest
        self.manager = remote(RolloutManager, {}, **options).remote(cfg)
        self.evaluation: Evaluation | None = None
        self.held: tuple[int, dict[str, float]] | None = None
        self.gpus = SharedGpus(cfg, self._train, self.timers, on=current())
        with span("start"):
            self._start(placement)
        if self.start_step > 0 and (cfg.checkpoint.load or not cfg.debug.needs_no_data_state):
            self._ask(self.manager.load.remote(self.start_step - 1), "the data state to be loaded")
        self.num_rollouts = self._num_rollouts()
        self.num_trained = self.start_step
        self._connect_engines()

    # -- start and stop --------------------------------------------------------------------------

    def _start(self, placement: Placement) -> None:
        """Engines and trainer start at the same time: each takes most of a minute.

        On shared GPUs the engines start first, because they measure the memory of an empty GPU.
        """
        cfg = self.cfg
        if placement.num_nodes > 1:
            self.log.starting(f"on {placement.num_nodes} nodes: {placement}")
        engines = self.manager.start.remote(None if cfg.debug.no_engines else placement)
        if not cfg.debug.no_engines:
            count = cfg.cluster.num_engines
            plural = "s" if count > 1 else ""
            self.log.starting(f"{count} vLLM engine{plural} (see {self.log.run_dir}/logs)")
        if self.gpus.engines_sleep:
            self._engines_started(engines)
            self._start_trainer()
        else:
            self._start_trainer()
            self._engines_started(engines)

    def _start_trainer(self) -> None:
        self.start_step = self.cfg.batch.start_rollout_id or 0
        if self.trainer:
            self.log.starting(f"the trainer on {self.cfg.cluster.trainer_gpus} ranks")
            self.start_step = self.trainer.start()
            self.gpus.trainer_started()

    def _engines_started(self, urls: ray.ObjectRef) -> None:
        timeout_s = self.cfg.engine.start_timeout_s
        self.engine_urls = self._ask(urls, "engines and router to start", timeout_s)
        self.gpus.engines_started([EngineClient(u, who="the run") for u in self.engine_urls])

    def _connect_engines(self) -> None:
        if self.engine_urls and self.trainer:
            timeout_s = self.cfg.engine.weight_transfer_timeout_s
            self._train("connect_engines", self.engine_urls, timeout_s=timeout_s)

    def stop(self) -> None:
        self._log_held()
        self._ask(self.manager.stop.remote(), "engines and router to stop", _STOP_TIMEOUT_S)

    # -- the steps of the loop -------------------------------------------------------------------

    def _num_rollouts(self) -> int:
        batch = self.cfg.batch
        if batch.num_rollout is not None:
            return batch.num_rollout
        prompts = self._ask(self.manager.count_prompts.remote(), "the number of prompts", 600)
        return batch.rollouts(prompts)

    def steps(self) -> Iterator[int]:
        """The rollouts left to do. A rollout is logged when the loop asks for the next one."""
        self.log.start(self.start_step, self.num_rollouts)
        if self.metrics or self.evaluation:  # from an evaluation before the first step
            self._log(self.start_step)
        for step in range(self.start_step, self.num_rollouts):
            started = time.perf_counter()
            with span("step", step=step):
                yield step
            step_s = time.perf_counter() - started
            self.metrics |= {"perf/step_time": step_s, **self.timers.take()}
            self.metrics["perf/wait_time_ratio"] = self.metrics["perf/train_wait_time"] / step_s
            self._log(step + 1)
        self.finish_evaluation()
        if self.trainer is not None and self.cfg.checkpoint.async_save:
            with self.log.phase("save"):
                self._train("finish_saves")

    def _log(self, num_trained: int) -> None:
        """Log a step. It waits while an evaluation of its weights runs."""
        self.held, self.metrics = (num_trained, self.metrics), {}
        if self.evaluation is None:
            self._log_held()

    def _log_held(self) -> None:
        if self.held is not None:
            self.log.step(*self.held)
            self.held = None

    def due(self, interval: int | None, step: int) -> bool:
        """True every `interval` rollouts and after the last one; never if `interval` is None."""
        if interval is None:
            return False
        return (step + 1) % interval == 0 or step + 1 == self.num_rollouts

    # -- generation ------------------------------------------------------------------------------

    def start_generating(self, step: int) -> RolloutHandle:
        """Begin rollout `step` in the background."""
        generate = self.manager.generate.options(num_returns=1 + self.cfg.dp)
        metrics, *parts = generate.remote(step)
        return RolloutHandle(step, metrics, parts)

    def finish(self, rollout: RolloutHandle) -> RolloutHandle:
        """Wait until a rollout is complete. Returns its handle.

        If engines were lost, the rollout is generated again and the handle is a new one.
        """

        def complete() -> None:
            try:
                self._ask(rollout.metrics, f"rollout {rollout.rollout_id}")
            except Exception:
                rollout.silence()
                raise

        def begin_again() -> None:
            nonlocal rollout
            self.sync_weights()
            rollout = self.start_generating(rollout.rollout_id)

        with self.timers("train_wait"):
            self._without_lost_engines(complete, begin_again)
        return rollout

    def generate(self, step: int) -> RolloutHandle:
        with self.log.phase("generate"):
            return self.finish(self.start_generating(step))

    def evaluate(self, step: int) -> None:
        def scores() -> dict[str, float]:
            with self.log.phase("evaluate"):
                return self._ask(self.manager.evaluate.remote(step), "the evaluation")

        self.metrics |= self._without_lost_engines(scores, self.sync_weights)

    def start_evaluating(self, step: int) -> None:
        """Evaluate beside generation and training. Call `finish_evaluation` before new weights."""
        self.evaluation = Evaluation(step, self.manager.evaluate.remote(step))

    def finish_evaluation(self) -> None:
        """Wait for the evaluation. Its metrics are those of the step whose weights it measured."""
        if self.evaluation is None:
            return
        running, self.evaluation = self.evaluation, None

        def scores() -> dict[str, float]:
            return self._ask(running.scores, "the evaluation")

        def begin_again() -> None:
            nonlocal running
            self.sync_weights()
            running = Evaluation(running.step, self.manager.evaluate.remote(running.step))

        with self.timers("eval_wait"):
            found = self._without_lost_engines(scores, begin_again)
        if self.held is None:
            self.metrics |= found
        else:
            self.held[1].update(found)
            self._log_held()

    # -- training --------------------------------------------------------------------------------

    def gpus_for_training(self) -> AbstractContextManager[None]:
        """Under --colocate the engines release their memory during the block."""
        if self.cfg.rollout.fully_async and self.gpus.shared:
            self.finish_evaluation()
            if self.gpus.engines_sleep:
                self._ask(self.manager.suspend.remote(), "generation to stand still")
        self._without_lost_engines(self.gpus.sleep_engines)
        return self.gpus.for_training()

    def train(self, rollout: RolloutHandle) -> None:
        """All optimizer steps of one rollout."""
        with self.log.phase("train"):
            self.metrics |= self._ask(rollout.metrics, "the rollout's metrics")
            if self.trainer is None:  # --debug-rollout-only
                return
            with self.timers("train"):
                timeout_s = self.cfg.engine.request_timeout_s
                self.metrics |= self.trainer.train(rollout.parts, timeout_s=timeout_s)
            self.num_trained = rollout.rollout_id + 1

    def sync_weights(self) -> None:
        """Put the trainer's weights into every engine, and check that all engines have them."""
        if not self.engine_urls or self.trainer is None:
            return

        def update() -> None:
            timeout_s = self.cfg.engine.weight_transfer_timeout_s + 30
            with self.log.phase("sync weights"), self.gpus.for_weight_update():
                self.metrics |= self._train("update_weights", self.num_trained, timeout_s=timeout_s)

        self._without_lost_engines(update)
        if self.cfg.rollout.fully_async:
            self._ask(self.manager.weights_are.remote(self.num_trained), "generation to go on")

    def save(self, step: int) -> None:
        """Commit a checkpoint: exports and data state, then weights, and last the tracker file."""
        if self.trainer is None:
            return
        with self.log.phase("save"), self.timers("save"):
            if self.cfg.checkpoint.save_hf:
                self._train("save_hf", self.cfg.checkpoint.save_hf.format(rollout_id=step))
            if self.cfg.checkpoint.save:
                begin_save(self.cfg.checkpoint.save, step)
                self.log.keep(step + 1, self.metrics)
                self._ask(self.manager.save.remote(step), "the data state to be saved")
                self._train("save", step)

    # -- lost engines ----------------------------------------------------------------------------

    def _without_lost_engines(
        self, work: Callable[[], T], prepare: Callable[[], None] = lambda: None
    ) -> T:
        """The result of `work`. If it fails because engines were lost, the log says which.

        Under --use-fault-tolerance: start these engines again, call `prepare` and repeat `work`.
        """
        restarts_left = _RESTARTS if self.cfg.engine.fault_tolerance else 0
        while True:
            try:
                return work()
            except EngineError:
                lost = self._ask(self.manager.lost_engines.remote(), "the engines to be checked")
                if not lost or restarts_left == 0:
                    raise
            restarts_left -= 1
            self._restart_engines(lost)
            prepare()

    def _restart_engines(self, lost: list[int]) -> None:
        """Start lost engines again. All engines and the trainer are then ready for an update."""
        with self.log.phase("restart engines"):
            self.gpus.free_trainer_memory()
            restarted = self.manager.restart_engines.remote(lost)
            timeout_s = self.cfg.engine.start_timeout_s + _STOP_TIMEOUT_S
            self._ask(restarted, "lost engines to start again", timeout_s)
            self.gpus.sleep_engines()
            with self.gpus.for_training():
                pass  # the trainer's weights return to the GPU
            self._connect_engines()
        name = "rollout/engines_restarted"
        self.metrics[name] = self.metrics.get(name, 0) + len(lost)

    # --------------------------------------------------------------------------------------------

    def _ask(self, ref: ray.ObjectRef, what: str, timeout_s: float | None = None) -> Any:
        return wait(ref, what=what, timeout_s=timeout_s or self.cfg.engine.request_timeout_s)

    def _train(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        timeout_s = timeout_s or self.cfg.engine.request_timeout_s
        return self.trainer.call(method, *args, timeout_s=timeout_s)
