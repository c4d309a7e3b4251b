"""The rollout manager: it turns prompts into a batch, with the engines and the data source."""

from __future__ import annotations

import os
import time
from typing import Any

from vime.addresses import host_and_port
from vime.backends.vllm.local_http import without_proxies
from vime.backends.vllm.router import address_in_args
from vime.backends.vllm.server import api_key
from vime.config import Config
from vime.config.view import ArgsView
from vime.data.chat import load_tokenizer
from vime.data.train_batch import parts_of
from vime.errors import EngineError
from vime.observe import spans
from vime.observe.spans import span
from vime.ray.engines import EngineGroup
from vime.ray.placement_group import Placement
from vime.ray.wait import stacks_if_longer_than
from vime.rollout import debug_data
from vime.rollout.ahead import Ahead, load_ahead, save_ahead
from vime.rollout.fully_async import GENERATION_TIME, Generation
from vime.rollout.saved_stream import load_stream, save_stream
from vime.rollout.sockets import raise_file_limit
from vime.rollout.train_data import eval_metrics, make_train_batch, rollout_metrics
from vime.types import RankBatch, RolloutFnEvalOutput, RolloutFnTrainOutput


class RolloutManager:
    """A plain class that Ray wraps. `start` once, then `generate`, `evaluate`, `save`, `stop`."""

    def __init__(self, cfg: Config) -> None:
        if cfg.log.timeline:
            spans.record(cfg.log.run_dir, "manager")
        self.cfg = cfg
        self.engines: EngineGroup | None = None
        # The data source's state right after each rollout: a checkpoint of rollout i must not
        # contain the prompts that rollout i+1, generated ahead, has taken.
        self.states: dict[int, Any] = {}
        self.latest: Ahead | None = None  # the newest rollout; an earlier checkpoint saves it too
        self.restored: Ahead | None = None  # the rollout that came with the checkpoint
        self.generation: Generation | None = None  # runs in the fully asynchronous mode

    def start(self, placement: Placement | None) -> list[str]:
        """Start engines and router (none without a placement) and load the data source.

        Returns the engines' URLs.
        """
        raise_file_limit()
        self.engines = EngineGroup(self.cfg, placement) if placement else None
        # The first use of a tokenizer takes seconds. The engines start meanwhile.
        load_tokenizer(self.cfg.model.hf_checkpoint)
        self.runtime: dict[str, Any] = {"vllm_engine_urls": ()}
        if self.engines:
            self.engines.wait_until_started()
            self._avoid_proxies()
            self.runtime = {
                "vllm_engine_urls": tuple(self.engines.urls),
                **address_in_args(self.engines.router.url),
                "vllm_api_key": api_key(self.cfg),
            }
        self.args = ArgsView(self.cfg, **self.runtime)
        rollout_fn = self.cfg.rollout.plugin("function_path")
        self.data_source = self.cfg.data.plugin("data_source_path")(self.args)
        self.eval_fn = self.cfg.eval.plugin("function_path") or rollout_fn
        loads = self.cfg.debug.load_rollout_data
        self.rollout_fn = debug_data.generate_rollout if loads else rollout_fn
        if self.cfg.rollout.fully_async and not loads:
            steps = self.cfg.batch.num_rollout or self.cfg.batch.rollouts(self.count_prompts())
            self.generation = Generation(self.cfg, self.runtime, self.data_source, steps)
            self.args = self.generation.args
        return list(self.runtime["vllm_engine_urls"])

    def _avoid_proxies(self) -> None:
        """Users' functions run in this process, and their requests to the run need no proxy."""
        urls = [self.engines.router.url, *self.engines.urls]
        hosts = dict.fromkeys(host_and_port(url)[0] for url in urls)
        os.environ.update(without_proxies(os.environ, *hosts))

    def load(self, rollout_id: int) -> None:
        """Continue with the data state that was saved with `rollout_id`."""
        self.data_source.load(rollout_id)
        if self.generation is not None:
            self.generation.restore(load_stream(self.cfg, rollout_id))
        else:
            self.restored = load_ahead(self.cfg, rollout_id)

    def lost_engines(self) -> list[int]:
        return self.engines.lost()

    def restart_engines(self, lost: list[int]) -> None:
        self.engines.restart(lost)

    def count_prompts(self) -> int:
        return len(self.data_source)

    def generate(self, rollout_id: int) -> tuple[dict[str, float] | RankBatch, ...]:
        """One rollout: its metrics, then the part of its batch for each data-parallel rank."""
        started = time.perf_counter()
        with span("wait for groups" if self.generation else "generate", rollout=rollout_id):
            output = self._samples_of(rollout_id)
        rollout_s = time.perf_counter() - started
        if self.generation is None and (state := self._data_state()) is not None:
            self.states[rollout_id] = state
            self.latest = Ahead(rollout_id, output, state)
        if path := self.cfg.debug.save_rollout_data:
            debug_data.save_rollout(path, rollout_id, output.samples, output.metrics)
        with span("batching", rollout=rollout_id):
            batch = make_train_batch(self.args, output.samples, rollout_id)
        tokens = sum(s.response_length for s in batch.sequences)
        # Generation that never stops takes longer than the wait for its groups.
        generation_s = output.metrics.get(GENERATION_TIME, rollout_s)
        metrics = {
            **output.metrics,
            **batch.metrics,
            "perf/rollout_time": rollout_s,
            "perf/batching_time": time.perf_counter() - started - rollout_s,
            "perf/tokens_per_gpu_per_sec": tokens / generation_s / self.cfg.cluster.rollout_gpus,
        }
        metrics = rollout_metrics(self.args, output.samples, rollout_id, metrics, rollout_s)
        return metrics, *parts_of(batch, self.cfg.dp)

    def _samples_of(self, rollout_id: int) -> RolloutFnTrainOutput:
        """The samples, from the checkpoint if it has this rollout, else from the rollout function.

        Under --use-fault-tolerance, the data source gets the prompts back when engines are lost.
        """
        restored, self.restored = self.restored, None
        if restored is not None and restored.rollout_id == rollout_id:
            self.data_source.load_state_dict(restored.data_state)
            return restored.output
        goes_back = self.cfg.engine.fault_tolerance and self.generation is None
        before = self._data_state() if goes_back else None
        try:
            with stacks_if_longer_than(self.cfg.engine.request_timeout_s):
                output = self.rollout_fn(self.args, rollout_id, self.data_source)
        except EngineError:
            if before is not None:
                self.data_source.load_state_dict(before)
            raise
        if not isinstance(output, RolloutFnTrainOutput):
            output = RolloutFnTrainOutput(output)
        return output

    def _data_state(self) -> Any:
        """The data source's state; None if a user's own source has none."""
        source = self.data_source
        return source.state_dict() if hasattr(source, "state_dict") else None

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        """Run the evaluation function. Its metrics are named eval/{dataset}..."""
        started = time.perf_counter()
        timeout_s = self.cfg.engine.request_timeout_s
        with stacks_if_longer_than(timeout_s), span("evaluate", "evaluations", step=rollout_id):
            output: RolloutFnEvalOutput = self.eval_fn(
                self.args, rollout_id, self.data_source, evaluation=True
            )
        eval_s = time.perf_counter() - started
        if path := self.cfg.debug.save_rollout_data:
            debug_data.save_evaluation(path, rollout_id, output)
        return {**eval_metrics(self.args, output, rollout_id), "perf/eval_time": eval_s}

    def save(self, rollout_id: int) -> None:
        """Write the data source's state as it was after rollout `rollout_id`."""
        with span("save", rollout=rollout_id):
            self._save(rollout_id)

    def _save(self, rollout_id: int) -> None:
        if self.generation is not None:
            with self.generation.suspended() as entries:
                self.data_source.save(rollout_id)
                save_stream(self.cfg, rollout_id, entries)
            return
        if rollout_id in self.states:
            self.data_source.save(rollout_id, state=self.states[rollout_id])
        else:
            self.data_source.save(rollout_id)
        save_ahead(self.cfg, rollout_id, self.latest)
        self.states = {i: s for i, s in self.states.items() if i > rollout_id}

    def weights_are(self, version: int) -> None:
        """The engines have new weights."""
        if self.generation is not None:
            self.generation.weights_are(version)

    def suspend(self) -> None:
        """Running requests stop where they are. The next `weights_are` goes on."""
        if self.generation is not None:
            with span("suspend"):
                self.generation.suspend()

    def stop(self) -> None:
        if self.generation is not None:
            self.generation.close()
        spans.stop()
        if self.engines:
            self.engines.stop()
