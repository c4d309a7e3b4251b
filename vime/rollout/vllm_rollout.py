"""The default rollout function: vLLM engines generate behind the router, graders reward.

`generate_rollout` is what the rollout manager calls; `generate` is what a custom generation
function calls to get tokens.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vime.config import Config
from vime.data import chat
from vime.errors import PluginError
from vime.rollout import grading, metrics
from vime.rollout.client import GenerateClient
from vime.rollout.filter_hub.dynamic_sampling_filters import as_verdict
from vime.rollout.plugins import (
    ALL_SAMPLES,
    DYNAMIC_FILTER,
    GENERATE,
    SAMPLE_FILTER,
    SAMPLE_HOOK,
    call,
    load_function,
    takes,
)
from vime.rollout.posting import RequestFailed
from vime.rollout.sampling import FAILED, Sampled, sample_groups
from vime.rollout.teacher import TeacherClient, teacher_of
from vime.rollout.wire import UNKNOWN_VERSION
from vime.types import (
    DynamicFilterOutput,
    Group,
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    Sample,
    Status,
)

_SEED_STRIDE = 1_000_003  # so that a continued sample does not replay the seed of its first part


@dataclass(slots=True)
class Rollout:
    """What one call of `generate_rollout` shares among its samples."""

    args: Any
    rollout_id: int
    client: GenerateClient
    tokenizer: Any
    evaluation: bool = False
    min_new_tokens: int | None = None
    teacher: TeacherClient | None = None
    reward_s: float = 0.0  # in which at least one group was being graded
    num_grading: int = 0
    grading_since: float = 0.0

    @property
    def cfg(self) -> Config:
        return self.args.config

    async def abort(self, drained: asyncio.Event) -> None:
        """Makes every pending group return, with what it has."""
        if self.teacher is not None:
            self.teacher.stopped.set()
        await self.client.abort(drained)

    @contextmanager
    def grading_timed(self) -> Iterator[None]:
        """Groups are graded side by side, so their own durations would add up to too much."""
        if self.num_grading == 0:
            self.grading_since = time.perf_counter()
        self.num_grading += 1
        try:
            yield
        finally:
            self.num_grading -= 1
            if self.num_grading == 0:
                self.reward_s += time.perf_counter() - self.grading_since


_current: contextvars.ContextVar[Rollout] = contextvars.ContextVar("vime_rollout")


def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """One rollout of --rollout-batch-size groups, or one evaluation over every --eval-prompt-data.

    args    the view that the rollout manager makes: `args.config`, the router's address and the
            engines' urls. Raises EngineError when engines stay away, PluginError on a bad hook.
    """
    if evaluation:
        from vime.rollout.evaluation import evaluate

        return run(evaluate(args, rollout_id))
    return run(_generate_rollout(args, rollout_id, data_source))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run`, on uvloop where it is installed: less CPU a request."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = None
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


async def _generate_rollout(args: Any, rollout_id: int, data_source: Any) -> RolloutFnTrainOutput:
    cfg: Config = args.config
    started = time.perf_counter()
    if hasattr(data_source, "rollout_id"):
        data_source.rollout_id = rollout_id  # the buffer filter judges age by it
    tokenizer = chat.load_tokenizer(cfg.model.hf_checkpoint)
    async with make_client(args) as client, teacher_of(cfg) as teacher:
        rollout = Rollout(args, rollout_id, client, tokenizer, teacher=teacher)
        _current.set(rollout)
        sampled = await sample_groups(
            target=cfg.batch.prompts,
            batch=cfg.rollout.over_sampling or cfg.batch.prompts,
            take=data_source.get_samples,
            finish=lambda group: finish_group(rollout, group),
            judge=lambda group: judge(args, group),
            abort=rollout.abort,
        )
    _run_hooks(args, data_source, sampled)
    num_kept_for_later = _return_leftovers(rollout, data_source, sampled)
    samples = [sample for group in sampled.kept for sample in group]
    grading.warn_of_missing_marks(args, samples)
    values = metrics.of_rollout(args, sampled, time.perf_counter() - started)
    values["rollout/buffer/returned"] = num_kept_for_later
    values["rollout/request_retries"] = client.endpoint.num_retries
    values["perf/reward_time"] = rollout.reward_s
    return RolloutFnTrainOutput(sampled.kept, values)


def make_client(args: Any) -> GenerateClient:
    """A client of the router that `args` names, bounded by --vllm-server-concurrency per engine."""
    cfg: Config = args.config
    urls = tuple(args.vllm_engine_urls)
    return GenerateClient(
        f"http://{args.vllm_router_ip}:{args.vllm_router_port}",
        urls,
        concurrency=cfg.rollout.concurrency * max(1, len(urls)),
        timeout_s=cfg.engine.request_timeout_s,
        known_version=getattr(args, "weight_version", None),
        api_key=getattr(args, "vllm_api_key", None),
    )


async def finish_group(rollout: Rollout, group: Group) -> Group:
    """Generates what the group's samples lack, then grades them. Returns early once aborted."""
    parts = await asyncio.gather(*(_finish_sample(rollout, sample) for sample in group))
    group = [sample for part in parts for sample in part]
    if not rollout.client.aborting:
        with rollout.grading_timed():
            await grading.grade_group(rollout.args, group)
            if rollout.teacher is not None:
                await rollout.teacher.judge(group)
        group = [await _run_sample_hooks(rollout, sample) for sample in group]
    return group


async def _run_sample_hooks(rollout: Rollout, sample: Sample) -> Sample:
    """--rollout-sample-hook-path, in the order given; each may replace the sample."""
    for path in rollout.cfg.rollout.sample_hook_paths or ():
        answer = await call(load_function(path, SAMPLE_HOOK), rollout.args, sample)
        if answer is not None and not isinstance(answer, Sample):
            raise PluginError(
                f"--rollout-sample-hook-path {path} returned {type(answer).__name__}; "
                "return the Sample, or None to keep the one it got."
            )
        sample = sample if answer is None else answer
    return sample


async def _finish_sample(rollout: Rollout, sample: Sample) -> list[Sample]:
    cfg = rollout.cfg
    sample.rollout_id = rollout.rollout_id
    if sample.response_length and cfg.rollout.mask_offpolicy and not rollout.evaluation:
        sample.loss_mask = [0] * sample.response_length
    if sample.status not in (Status.PENDING, Status.ABORTED):
        return [sample]
    path = sample.generate_function_path or cfg.rollout.custom_generate_path
    params = sampling_params(rollout, sample)
    try:
        if path is None:
            result = await generate(rollout.args, sample, params)
        else:
            function = load_function(path, GENERATE)
            also = {"evaluation": rollout.evaluation} if takes(function, "evaluation") else {}
            result = await call(function, rollout.args, sample, params, **also)
    except RequestFailed as error:
        sample.status, sample.failure = Status.FAILED, str(error)
        return [sample]
    return result if isinstance(result, list) else [result]


def sampling_params(rollout: Rollout, sample: Sample) -> dict[str, Any]:
    """--rollout-* as the engine takes them.

    Seeds are asked for, not the default: an engine samples seeded requests one by one.
    """
    cfg = rollout.cfg.rollout
    return {
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "top_k": cfg.top_k,
        "max_tokens": cfg.max_response_len,
        "max_context_len": cfg.max_context_len,
        "stop": cfg.stop,
        "stop_token_ids": cfg.stop_token_ids,
        "skip_special_tokens": cfg.skip_special_tokens,
        "min_tokens": rollout.min_new_tokens,
        "seed": rollout.cfg.data.seed + (sample.index or 0) if cfg.deterministic else None,
    }


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Lets the engine continue `sample` from all tokens it has; the new ones carry loss.

    `sampling_params["max_tokens"]` bounds the whole response, earlier parts included, and
    "max_context_len" prompt and response. Sets tokens, log-probabilities, versions, text, status.
    Raises RequestFailed.
    """
    rollout = _current.get()
    params = dict(sampling_params)
    context = params.pop("max_context_len", None)
    if not sample.tokens:
        sample.tokens = _prompt_tokens(rollout, sample)
    left = params["max_tokens"] - sample.response_length
    if context is not None:
        left = min(left, context - len(sample.tokens))
    if left <= 0:
        sample.status = Status.TRUNCATED
        return sample
    params["max_tokens"] = left
    if params.get("seed") is not None:
        params["seed"] += _SEED_STRIDE * sample.response_length
    number = id(sample) if sample.index is None else sample.index
    session = sample.session_id or f"{rollout.rollout_id}-{number}"
    generation = await rollout.client.generate(sample.tokens, params, session)
    append(sample, generation)
    if generation.token_ids:
        sample.response = chat.decode(
            rollout.tokenizer,
            sample.tokens[sample.prompt_length :],
            skip_special_tokens=bool(params.get("skip_special_tokens")),
        )
    return sample


def _prompt_tokens(rollout: Rollout, sample: Sample) -> list[int]:
    """Of a prompt that no data set has tokenised: text, or messages for the chat template."""
    text = sample.prompt
    if not isinstance(text, str):
        kwargs = sample.apply_chat_template_kwargs or rollout.cfg.data.apply_chat_template_kwargs
        text = chat.render_prompt(rollout.tokenizer, text, template_kwargs=kwargs)
    return chat.encode(rollout.tokenizer, [text])[0]


def append(sample: Sample, generation: Any) -> None:
    """Adds an answer's tokens behind the sample's own; every list keeps one entry a token."""
    count = len(generation.token_ids)
    if sample.loss_mask is not None:
        sample.loss_mask = sample.loss_mask + [1] * count
    sample.tokens = sample.tokens + generation.token_ids
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + generation.log_probs
    sample.weight_versions = sample.weight_versions + generation.weight_versions
    sample.response_length += count
    sample.status = generation.status


def append_observation(sample: Sample, text: str) -> None:
    """Adds what the model did not write (a tool's answer) behind the sample's tokens, without loss.

    For custom generation functions. The tokens that are there stay as they are. The observation has
    no log-probability and no weights that made it: 0 and UNKNOWN_VERSION, where nothing reads them.
    """
    tokenizer = _current.get().tokenizer
    ids = chat.encode(tokenizer, [text])[0]
    if sample.loss_mask is None:
        sample.loss_mask = [1] * sample.response_length
    sample.loss_mask = sample.loss_mask + [0] * len(ids)
    sample.tokens = sample.tokens + ids
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + [0.0] * len(ids)
    sample.weight_versions = sample.weight_versions + [UNKNOWN_VERSION] * len(ids)
    sample.response_length += len(ids)
    sample.response = chat.decode(tokenizer, sample.tokens[sample.prompt_length :])


def judge(args: Any, group: Group) -> DynamicFilterOutput:
    """Keep or drop: a group without a reward is dropped, the rest is up to the dynamic filter.

    The filter sees the samples that have a reward.
    """
    usable = [s for s in group if s.status is not Status.FAILED and s.reward is not None]
    if not usable:
        return DynamicFilterOutput(False, FAILED)
    path = args.config.rollout.dynamic_filter_path
    if path is None:
        return DynamicFilterOutput(True)
    return as_verdict(load_function(path, DYNAMIC_FILTER)(args, usable), usable, args)


def _run_hooks(args: Any, data_source: Any, sampled: Sampled) -> None:
    """The sample filter on what will be trained on, then the hook that sees everything."""
    cfg = args.config.rollout
    if cfg.sample_filter_path:
        load_function(cfg.sample_filter_path, SAMPLE_FILTER)(args, sampled.kept)
    if cfg.all_samples_path:
        groups = sampled.kept + sampled.dropped + sampled.surplus + sampled.unfinished
        samples = [sample for group in groups for sample in group]
        load_function(cfg.all_samples_path, ALL_SAMPLES)(args, samples, data_source)


def _return_leftovers(rollout: Rollout, data_source: Any, sampled: Sampled) -> int:
    """Under --partial-rollout, unfinished and surplus groups go to the buffer. Returns how many.

    A surplus group would train on nothing where the tokens of earlier rollouts carry no loss.
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
