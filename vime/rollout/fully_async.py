"""Fully asynchronous generation, for `train_async.py`.

    --rollout-function-path vime.rollout.fully_async.generate_rollout

The engines generate while the trainer trains, and while it waits. `generate_rollout` returns the
groups of a step as soon as they are there. `Generation` runs a `GroupStream` in a thread of the
rollout manager.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any

from vime.config import Config
from vime.config.view import ArgsView
from vime.data import chat
from vime.errors import EngineError
from vime.rollout import grading, metrics
from vime.rollout.data_source import start_over
from vime.rollout.evaluation import evaluate
from vime.rollout.generation import Rollout, finish_or_stop, make_client
from vime.rollout.sampling import Sampled
from vime.rollout.stream import Collected, Entry, GroupStream, Late, Pace
from vime.rollout.teacher import teacher_of
from vime.rollout.vllm_rollout import judge, run, run_hooks
from vime.types import Group, RolloutFnEvalOutput, RolloutFnTrainOutput, Sample

GENERATION_TIME = "perf/generation_time"  # since the previous step had its groups
CALL_TIMEOUT_S = 300.0  # of a call that waits for no generation


def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The groups of one step, or one evaluation of all data sets.

    args  the rollout manager's view; `args.generation` is the running `Generation`
    Raises EngineError when engines do not answer, and PluginError when a hook breaks its contract.
    """
    generation: Generation = args.generation
    if evaluation:
        return generation.do(evaluate(args, rollout_id))
    return generation.do(generation.groups_of(rollout_id))


class Generation:
    """A stream of groups and the thread that runs it. Methods block, and may be called anywhere.

    runtime    the addresses of a running job, for `args`
    num_steps  number of steps of the run, those before a resumption included
    """

    def __init__(
        self, cfg: Config, runtime: dict[str, Any], data_source: Any, num_steps: int
    ) -> None:
        self.cfg, self.data_source = cfg, data_source
        self.args = args = ArgsView(cfg, **runtime, generation=self)
        rollout, batch = cfg.rollout, cfg.batch
        self.tokenizer = chat.load_tokenizer(self.cfg.model.hf_checkpoint)
        source = self.cfg.data.plugin("data_source_path")
        assert source is not None
        pace = Pace(
            batch=batch.prompts,
            max_staleness=rollout.max_weight_staleness,
            num_steps=num_steps,
            spare=(rollout.over_sampling or batch.prompts) - batch.prompts,
        )
        self.stream = GroupStream(
            pace,
            late=Late(rollout.late_groups),
            take=partial(source.call_method, data_source, "get_samples"),
            finish=lambda group, ended: finish_or_stop(self._running, group, ended),
            judge=lambda group: judge(args, group),
            abort=lambda: self._running.abort(),
            renew=renewed,
            at_once=rollout.concurrency * max(1, len(runtime["vllm_engine_urls"])),
        )
        self.rollout: Rollout | None = None
        self.open = AsyncExitStack()
        self.num_retries = 0
        self.reward_s = 0.0
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def serve() -> None:
            stopped = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), stopped))
            await stopped.wait()

        self._thread = threading.Thread(target=lambda: run(serve()), name="generation", daemon=True)
        self._thread.start()
        self._loop, self._stopped = started.result(CALL_TIMEOUT_S)

    @property
    def _running(self) -> Rollout:
        assert self.rollout is not None, "generation is suspended"
        return self.rollout

    def do(self, work: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> Any:
        """Runs `work` in the stream's event loop. Raises EngineError after `timeout_s`."""
        future: Future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise EngineError(f"generation did not answer within {timeout_s:g} s") from None

    @property
    def cache_salt(self) -> str | None:
        """Separates the prefix caches of weight versions, if engines keep what old weights made."""
        return str(self.stream.version) if self.cfg.rollout.keeps_kv_cache else None

    def __reduce__(self) -> tuple:
        """`args` can be pickled. A copy of it in another process has no stream."""
        return type(None), ()

    # -- what the rollout manager calls ----------------------------------------------------------

    def weights_are(self, version: int) -> None:
        """The engines have new weights. The first call starts generation."""

        async def work() -> None:
            self.stream.weights_are(version)
            if self.rollout is None:
                await self._resume()
            self._running.client.cache_salt = self.cache_salt

        self.do(work(), CALL_TIMEOUT_S)

    def suspend(self) -> None:
        """Stop all requests where they are. The next `weights_are` goes on."""
        self.do(self._suspend(), CALL_TIMEOUT_S)

    @contextmanager
    def suspended(self) -> Iterator[list[Entry]]:
        """All outstanding groups, with their tokens so far. They stand still during the block."""
        ran = self.rollout is not None
        self.suspend()
        yield self.stream.entries
        if ran:
            self.do(self._resume(), CALL_TIMEOUT_S)

    def restore(self, entries: list[Entry]) -> None:
        """Continue with the groups of another run."""
        self.stream.restore(entries)

    def close(self) -> None:
        """Ends the thread. Unfinished groups are lost."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(CALL_TIMEOUT_S)

    # -- in the event loop -----------------------------------------------------------------------

    async def _resume(self) -> None:
        client = await self.open.enter_async_context(make_client(self.args))
        teacher = await self.open.enter_async_context(teacher_of(self.cfg))
        step = self.stream.step
        self.rollout = Rollout(self.args, step, client, self.tokenizer, teacher=teacher)
        self.stream.resume()

    async def _suspend(self) -> None:
        if self.rollout is None:
            return
        await self.stream.suspend()
        self._count()
        await self.open.aclose()
        self.rollout = None

    def _count(self) -> None:
        """Moves the counters of the present rollout to this object's."""
        if self.rollout is not None:
            endpoint = self.rollout.client.endpoint
            self.num_retries, endpoint.num_retries = self.num_retries + endpoint.num_retries, 0
            self.reward_s, self.rollout.reward_s = self.reward_s + self.rollout.reward_s, 0.0

    async def groups_of(self, step: int) -> RolloutFnTrainOutput:
        """The groups and the metrics of a step."""
        if hasattr(self.data_source, "rollout_id"):
            self.data_source.rollout_id = step
        if self.cfg.debug.rollout_only:  # nobody updates weights, so every version is the newest
            self.stream.weights_are(step)
        if self.rollout is None:
            await self._resume()
        collected = await self.stream.collect(step)
        for group in collected.kept:
            for sample in group:
                sample.rollout_id = step
        sampled = Sampled(
            kept=collected.kept,
            dropped=collected.dropped,
            unfinished=[entry.group for entry in collected.late],
            drops=collected.drops,
            num_taken=collected.num_taken,
        )
        await run_hooks(self.args, self.data_source, sampled)
        grading.warn_of_missing_marks(self.args, [s for group in sampled.kept for s in group])
        values = metrics.of_rollout(self.args, sampled, collected.seconds, step)
        self._count()
        values |= of_stream(collected)
        values |= getattr(self.data_source, "skipped", {})
        values["rollout/request_retries"], self.num_retries = self.num_retries, 0
        values["perf/reward_time"], self.reward_s = self.reward_s, 0.0
        return RolloutFnTrainOutput(sampled.kept, values)


def of_stream(collected: Collected) -> dict[str, float]:
    """The stream's metrics of a step."""
    late = [s.response_length for entry in collected.late for s in entry.group]
    return {
        "rollout/groups_running": collected.running,
        "rollout/groups_waiting": collected.waiting,
        "rollout/groups_late": len(collected.late),
        "rollout/late_tokens": sum(late),
        "rollout/late_response_len": sum(late) / len(late) if late else 0.0,
        "perf/groups_wait_time": collected.waited_s,
        "perf/engines_idle_time": collected.idle_s,
        GENERATION_TIME: collected.seconds,
    }


def renewed(group: Group) -> Group:
    """A copy of a group without responses."""
    copies = [Sample.from_dict(sample.to_dict()) for sample in group]
    for sample in copies:
        start_over(sample)
    return copies
