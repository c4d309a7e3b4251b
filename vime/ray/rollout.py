"""The rollout manager: owns engines, router and data source; turns prompts into a TrainBatch."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray

from vime.backends.vllm.client import EngineClient
from vime.backends.vllm.engine import VLLMEngine, logs_dir
from vime.backends.vllm.router import Router
from vime.backends.vllm.server import api_key
from vime.config import Config
from vime.config.view import ArgsView
from vime.data.chat import load_tokenizer
from vime.errors import EngineError
from vime.ray.placement_group import Placement
from vime.ray.wait import stacks_if_longer_than, wait, wait_all
from vime.rollout import debug_data
from vime.rollout.ahead import Ahead, load_ahead, save_ahead
from vime.rollout.train_data import eval_metrics, make_train_batch, rollout_metrics
from vime.types import RolloutFnEvalOutput, RolloutFnTrainOutput, TrainBatch

log = logging.getLogger(__name__)

_CHECK_TIMEOUT_S = 60.0


class RolloutManager:
    """A plain class that Ray wraps. `start` once, then `generate`, `evaluate`, `save`, `stop`."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.placement: Placement | None = None
        self.engines: list[Any] = []
        self.router: Router | None = None
        # The data source's state right after each rollout was generated: with rollouts generated
        # ahead, a checkpoint of rollout i must not contain what rollout i+1 consumed.
        self.states: dict[int, Any] = {}
        self.latest: Ahead | None = None  # the newest rollout, in case it is ahead of a checkpoint
        self.restored: Ahead | None = None  # the one that came with the checkpoint

    def start(self, placement: Placement | None) -> list[str]:
        """Starts engines (none without a placement), router, data source. Gives the engine urls."""
        self.placement = placement
        if placement:
            self.engines = [self._engine(i) for i in range(self.cfg.cluster.num_engines)]
        starting = [engine.start.remote() for engine in self.engines]
        # While engines start: the first use of a tokenizer costs seconds.
        load_tokenizer(self.cfg.model.hf_checkpoint)
        what, timeout_s = f"{len(starting)} vLLM engines to start", self.cfg.engine.start_timeout_s
        urls = wait_all(starting, what=what, timeout_s=timeout_s)
        runtime: dict[str, Any] = {"vllm_engine_urls": tuple(urls)}
        if urls:
            self.router = Router(self.cfg)
            host, port = self.router.start(urls).removeprefix("http://").rsplit(":", 1)
            runtime |= {"vllm_router_ip": host, "vllm_router_port": int(port)}
            runtime |= {"vllm_api_key": api_key(self.cfg)}
        self.runtime = runtime
        self.args = ArgsView(self.cfg, **runtime)
        rollout_fn = self.cfg.rollout.plugin("function_path")
        self.data_source = self.cfg.data.plugin("data_source_path")(self.args)
        self.eval_fn = self.cfg.eval.plugin("function_path") or rollout_fn
        loads = self.cfg.debug.load_rollout_data
        self.rollout_fn = debug_data.generate_rollout if loads else rollout_fn
        return urls

    def load(self, rollout_id: int) -> None:
        """Continues with the data state that was saved with `rollout_id`."""
        self.data_source.load(rollout_id)
        self.restored = load_ahead(self.cfg, rollout_id)

    def _engine(self, index: int) -> Any:
        """The actor that will own an engine's server."""
        placement, per_engine = self.placement, self.cfg.cluster.gpus_per_engine
        mine = placement.engine_bundles[index * per_engine : (index + 1) * per_engine]
        slots = [placement.device_ids[b] for b in mine]
        options = placement.options("engine", mine[0])
        return ray.remote(VLLMEngine).options(**options).remote(self.cfg, index, slots)

    def lost_engines(self) -> list[int]:
        """Which engines died or do not answer."""
        checks, lost = [engine.check.remote() for engine in self.engines], []
        for index, check in enumerate(checks):
            try:
                wait(check, what=f"vLLM engine {index} to answer", timeout_s=_CHECK_TIMEOUT_S)
            except (EngineError, TimeoutError, ray.exceptions.RayError) as error:
                reason = str(getattr(error, "cause", error)).partition(";")[0]
                if isinstance(error, ray.exceptions.RayActorError):
                    reason = f"the owner of vLLM engine {index} died"
                where = logs_dir(self.cfg) / f"engine-{index}.log"
                log.warning("engine lost: %s (see %s)", reason, where)
                lost.append(index)
        return lost

    def restart_engines(self, lost: list[int]) -> None:
        """Starts them again, each at its URL, with the weights of --hf-checkpoint."""
        for index in lost:
            stop = self.engines[index].stop.remote()
            try:
                wait(stop, what=f"vLLM engine {index} to stop", timeout_s=_CHECK_TIMEOUT_S)
            except (TimeoutError, ray.exceptions.RayError):  # its owner is lost too
                ray.kill(self.engines[index])
                self.engines[index] = self._engine(index)
        urls = self.args.vllm_engine_urls
        starts = [self.engines[index].start.remote(urls[index]) for index in lost]
        what, timeout_s = f"{len(lost)} vLLM engines to start", self.cfg.engine.start_timeout_s
        wait_all(starts, what=what, timeout_s=timeout_s)

    def count_prompts(self) -> int:
        return len(self.data_source)

    def generate(self, rollout_id: int) -> tuple[TrainBatch, dict[str, float]]:
        """One rollout, batched for the trainer, and its metrics."""
        started = time.perf_counter()
        has_state = hasattr(self.data_source, "state_dict")  # a user's own source may have none
        may_repeat = has_state and self.cfg.engine.fault_tolerance
        before = self.data_source.state_dict() if may_repeat else None
        try:
            output = self._samples_of(rollout_id)
        except EngineError:
            if before is not None:
                self.data_source.load_state_dict(before)
            raise
        rollout_s = time.perf_counter() - started
        if has_state:
            self.states[rollout_id] = self.data_source.state_dict()
            self.latest = Ahead(rollout_id, output, self.states[rollout_id])
        if path := self.cfg.debug.save_rollout_data:
            debug_data.save_rollout(path, rollout_id, output.samples, output.metrics)
        batch = make_train_batch(self.args, output.samples, rollout_id)
        tokens = sum(s.response_length for s in batch.sequences)
        metrics = {
            **output.metrics,
            **batch.metrics,
            "perf/rollout_time": rollout_s,
            "perf/batching_time": time.perf_counter() - started - rollout_s,
            "perf/tokens_per_gpu_per_sec": tokens / rollout_s / self.cfg.cluster.rollout_gpus,
        }
        return batch, rollout_metrics(self.args, output.samples, rollout_id, metrics, rollout_s)

    def _args_now(self) -> ArgsView:
        """`args`, with the engines' weight version where their answers do not name it."""
        urls = self.runtime.get("vllm_engine_urls")
        client = EngineClient(urls[0], who="the rollout manager") if urls else None
        if client is None or client.dialect.names_weights:
            return self.args
        return ArgsView(self.cfg, **self.runtime, weight_version=client.weight_versions()[0])

    def _samples_of(self, rollout_id: int) -> RolloutFnTrainOutput:
        restored, self.restored = self.restored, None
        if restored is not None and restored.rollout_id == rollout_id:
            self.data_source.load_state_dict(restored.data_state)
            return restored.output
        args = self._args_now()
        with stacks_if_longer_than(self.cfg.engine.request_timeout_s):
            output = self.rollout_fn(args, rollout_id, self.data_source)
        if not isinstance(output, RolloutFnTrainOutput):
            output = RolloutFnTrainOutput(output)
        return output

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        """Runs the evaluation function; its metrics are named eval/{dataset}..."""
        started = time.perf_counter()
        with stacks_if_longer_than(self.cfg.engine.request_timeout_s):
            output: RolloutFnEvalOutput = self.eval_fn(
                self._args_now(), rollout_id, self.data_source, evaluation=True
            )
        eval_s = time.perf_counter() - started
        if path := self.cfg.debug.save_rollout_data:
            debug_data.save_evaluation(path, rollout_id, output)
        return {**eval_metrics(self.args, output, rollout_id), "perf/eval_time": eval_s}

    def save(self, rollout_id: int) -> None:
        """Writes the data source's state as it was when `rollout_id` had been generated."""
        if rollout_id in self.states:
            self.data_source.save(rollout_id, state=self.states[rollout_id])
        else:
            self.data_source.save(rollout_id)
        save_ahead(self.cfg, rollout_id, self.latest)
        self.states = {i: s for i, s in self.states.items() if i > rollout_id}

    def stop(self) -> None:
        """Ends router and engines; one that fails to stop does not keep the others alive."""
        if self.router:
            self.router.stop()
        stops = [engine.stop.remote() for engine in self.engines]
        wait_all(stops, what="the vLLM engines to stop", timeout_s=60)
