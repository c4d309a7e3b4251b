"""The default rollout function: vLLM engines generate, graders give rewards."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from vime.config import Config
from vime.data import chat
from vime.errors import PluginError
from vime.plugins.hook import Plugin
from vime.rollout import grading, metrics
from vime.rollout.deadline import Overran, ended_by
from vime.rollout.evaluation import evaluate
from vime.rollout.filter_hub.dynamic_sampling_filters import as_verdict
from vime.rollout.generation import Rollout, finish_group, make_client
from vime.rollout.sampling import FAILED, Sampled, sample_groups
from vime.rollout.teacher import teacher_of
from vime.types import (
    DynamicFilterOutput,
    Group,
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    Status,
)


def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """One rollout of --rollout-batch-size groups, or one evaluation of all data sets.

    args    the rollout manager's view: `args.config`, the router's address, the engines' URLs
    Raises EngineError when engines do not answer, and PluginError when a hook breaks its contract.
    """
    if evaluation:
        return run(evaluate(args, rollout_id))
    return run(_generate_rollout(args, rollout_id, data_source))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run`, with uvloop if it is installed, because that needs less CPU per request.

    The loop's task returns nothing: asyncio's handler of SIGINT refers to the task, and the signal
    module prints the handler, result included, to find its name. That took 29 ms a sample.
    """
    answers: list[Any] = []

    async def main() -> None:
        answers.append(await work)

    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = None
    with _few_collections(), asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())
    return answers[0]


@contextmanager
def _few_collections() -> Iterator[None]:
    """Python looks for unreachable cycles a hundred times less often.

    A rollout makes hundreds of thousands of objects that live until its end. Looking at them again
    and again takes a fifth of the client's time.
    """
    usual = gc.get_threshold()
    gc.set_threshold(100 * usual[0], *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


async def _generate_rollout(args: Any, rollout_id: int, data_source: Any) -> RolloutFnTrainOutput:
    cfg: Config = args.config
    started = time.perf_counter()
    if hasattr(data_source, "rollout_id"):
        data_source.rollout_id = rollout_id  # the buffer filter computes ages with it
    tokenizer = chat.load_tokenizer(cfg.model.hf_checkpoint)
    source = cfg.data.plugin("data_source_path")
    assert source is not None
    async with make_client(args) as client, teacher_of(cfg) as teacher:
        rollout = Rollout(args, rollout_id, client, tokenizer, teacher=teacher)
        sampled = await sample_groups(
            target=cfg.batch.prompts,
            batch=cfg.rollout.over_sampling or cfg.batch.prompts,
            take=partial(source.call_method, data_source, "get_samples"),
            finish=lambda group: finish_group(rollout, group),
            judge=lambda group: judge(args, group),
            abort=rollout.abort,
        )
    await run_hooks(args, data_source, sampled)
    num_kept_for_later = _return_leftovers(rollout, data_source, sampled)
    samples = [sample for group in sampled.kept for sample in group]
    grading.warn_of_missing_marks(args, samples)
    values = metrics.of_rollout(args, sampled, time.perf_counter() - started, rollout_id)
    values["rollout/buffer/returned"] = num_kept_for_later
    values |= getattr(data_source, "skipped", {})
    values["rollout/request_retries"] = client.endpoint.num_retries
    values["perf/reward_time"] = rollout.reward_s
    return RolloutFnTrainOutput(sampled.kept, values)


async def judge(args: Any, group: Group) -> DynamicFilterOutput:
    """Whether to train on a group. A group without any reward is dropped.

    --dynamic-sampling-filter-path judges the other groups; it gets the samples with a reward.
    """
    usable = [s for s in group if s.status is not Status.FAILED and s.reward is not None]
    if not usable:
        return DynamicFilterOutput(False, FAILED)
    keeps = args.config.rollout.plugin("dynamic_filter_path")
    if keeps is None:
        return DynamicFilterOutput(True)
    return as_verdict(await _answer(keeps, args, usable), usable, args)


async def run_hooks(args: Any, data_source: Any, sampled: Sampled) -> None:
    """Calls the sample filter with the groups to train on, then the hook that sees all samples."""
    cfg = args.config.rollout
    if sample_filter := cfg.plugin("sample_filter_path"):
        await _answer(sample_filter, args, sampled.kept)
    if sees_all := cfg.plugin("all_samples_path"):
        groups = sampled.kept + sampled.dropped + sampled.surplus + sampled.unfinished
        samples = [sample for group in groups for sample in group]
        await _answer(sees_all, args, samples, data_source)


async def _answer(hook: Plugin, args: Any, *subjects: Any) -> Any:
    """What a hook of groups returns. Nothing replaces its answer, so the run ends without it."""
    limit_s = args.config.rollout.generate_timeout_s
    try:
        return await ended_by(hook.call(args, *subjects), seconds=limit_s)
    except Overran:
        raise PluginError(
            f"{hook.named_by} {hook.path} took longer than {limit_s:g} s (--generate-timeout-secs)"
        ) from None


def _return_leftovers(rollout: Rollout, data_source: Any, sampled: Sampled) -> int:
    """Under --partial-rollout, puts unfinished and surplus groups into the buffer.

    Returns the number of these groups. Under --mask-offpolicy-in-partial-rollout, surplus groups
    are dropped, because none of their tokens would have loss.
    """
    cfg = rollout.cfg.rollout
    if not cfg.partial:
        return 0
    leftovers = sampled.unfinished + ([] if cfg.mask_offpolicy else sampled.surplus)
    for group in leftovers:
        for sample in group:
            if sample.status is Status.FAILED and sample.reward is None:
                continue
            if sample.response_length:
                sample.metadata.setdefault("start_rollout_id", rollout.rollout_id)
    if leftovers:
        data_source.add_samples(leftovers)
    return len(leftovers)
