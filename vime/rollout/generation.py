"""Generates one sample with an engine, and grades it together with its group.

A custom generation function calls `generate` to get tokens and `append_observation` to add a tool's
answer.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from vime.addresses import url_of
from vime.config import Config
from vime.data import chat
from vime.errors import PluginError
from vime.number_lists import Numbers, Runs, distinct, extend, listed, stored
from vime.observe.spans import span
from vime.plugins.hook import Plugin
from vime.plugins.rollout import GENERATE
from vime.rollout import grading, wire
from vime.rollout.client import GenerateClient
from vime.rollout.deadline import Overran, Stopped, ended_by
from vime.rollout.failures import Failure, fail, failing
from vime.rollout.posting import RequestFailed
from vime.rollout.sockets import most_requests
from vime.rollout.teacher import TeacherClient
from vime.rollout.wire import UNKNOWN_VERSION
from vime.types import Group, Sample, Status

logger = logging.getLogger(__name__)

_SEED_STRIDE = 1_000_003  # a sample that is continued gets a new seed for the new part
ABORT_GRACE_S = 30.0  # the time that a generation function has for its tools after an abort


@dataclass(slots=True)
class Rollout:
    """The things that all samples of one rollout, or of one evaluation data set, share."""

    args: Any
    rollout_id: int
    client: GenerateClient
    tokenizer: Any
    evaluation: bool = False
    min_new_tokens: int | None = None
    teacher: TeacherClient | None = None
    reward_s: float = 0.0  # seconds in which at least one group was being graded
    num_grading: int = 0
    grading_since: float = 0.0
    stopped: asyncio.Event = field(default_factory=asyncio.Event)  # set once an abort has drained

    @property
    def cfg(self) -> Config:
        return self.args.config

    async def abort(self) -> None:
        """Makes every pending group return with the tokens that it has so far.

        Waits for the requests in flight. Then groups that are still being graded return without
        rewards, and a later rollout grades them.
        """
        if self.teacher is not None:
            self.teacher.stopped.set()
        try:
            await self.client.abort()
        finally:
            self.stopped.set()

    @property
    def numeric_rewards(self) -> bool:
        """Whether a dict reward must have a number under --reward-key."""
        return self.evaluation or self.cfg.reward.post_process_path is None

    @contextmanager
    def grading_timed(self) -> Iterator[None]:
        """Adds the time to `reward_s`. Time in which several groups are graded counts once."""
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


def current_rollout() -> Rollout:
    """The rollout of the calling coroutine. Raises PluginError outside a rollout."""
    try:
        return _current.get()
    except LookupError:
        raise PluginError(
            "generate and append_observation work inside a rollout only. Call them from the "
            "function of --custom-generate-function-path, in the coroutine that vime awaits or in "
            "a task that it starts; a thread that you start does not know the rollout."
        ) from None


def make_client(
    args: Any, per_engine: int | None = None, purpose: str = "generate"
) -> GenerateClient:
    """A client of the router in `args`.

    per_engine  bounds the requests in flight (default: --vllm-server-concurrency)
    purpose     the name of the requests in the timeline

    The machine's limits of files and ports bound the requests of all engines together.
    """
    cfg: Config = args.config
    urls = tuple(args.vllm_engine_urls)
    asked = (per_engine or cfg.rollout.concurrency) * max(1, len(urls))
    most, setting = most_requests()
    batch = (cfg.rollout.over_sampling or cfg.batch.prompts) * cfg.batch.samples_per_prompt
    if most < min(asked, batch):
        logger.warning(
            "only %d requests are open at once, because of %s on this machine. %d engines could "
            "have %d. Raise it if engines have too little work.",
            most,
            setting,
            max(1, len(urls)),
            min(asked, batch),
        )
    stream = getattr(args, "generation", None)
    return GenerateClient(
        url_of(args.vllm_router_ip, args.vllm_router_port),
        urls,
        concurrency=min(asked, most),
        timeout_s=cfg.engine.request_timeout_s,
        api_key=getattr(args, "vllm_api_key", None),
        cache_salt=stream.cache_salt if stream else None,
        purpose=purpose,
    )


async def finish_group(rollout: Rollout, group: Group) -> Group:
    """Generates and grades a group. After an abort it returns at once, without grades.

    Call it in its own task, because it sets the task's rollout, which `generate` reads.
    """
    return (await finish_or_stop(rollout, group))[0]


async def finish_or_stop(
    rollout: Rollout, group: Group, sample_ended: Callable[[], None] = lambda: None
) -> tuple[Group, bool]:
    """`finish_group`, and whether the group is complete. If not, call this again later.

    sample_ended  called after each generated response
    """

    async def finish(sample: Sample) -> list[Sample]:
        made = await _finish_sample(rollout, sample)
        sample_ended()
        return made

    _current.set(rollout)
    with span(rollout.client.purpose, "groups", group=group[0].group_index):
        parts = await asyncio.gather(*map(finish, group))
        group = [sample for part in parts for sample in part]
        if rollout.client.aborting or not await _graded(rollout, group):
            return group, False
        group = [await _run_sample_hooks(rollout, sample) for sample in group]
    grading.check_group(rollout.args, group, as_number=rollout.numeric_rewards)
    return group, True


async def _graded(rollout: Rollout, group: Group) -> bool:
    """Whether grader and teacher have judged the group; False if an abort came first."""
    work = grading.grade_group(rollout.args, group, as_number=rollout.numeric_rewards)
    with rollout.grading_timed():
        try:
            await ended_by(work, stopped=rollout.stopped)
        except Stopped:
            return False
        if rollout.teacher is None:
            return True
        with span("judge", "teacher", group=group[0].group_index):
            await rollout.teacher.judge(group)
        return not rollout.teacher.stopped.is_set()


async def _run_sample_hooks(rollout: Rollout, sample: Sample) -> Sample:
    """Calls every --rollout-sample-hook-path in order; each may replace the sample."""
    limit_s = rollout.cfg.rollout.generate_timeout_s
    for hook in rollout.cfg.rollout.plugins("sample_hook_paths"):
        with failing([sample], Failure.HOOK, f"{hook.named_by} {hook.path}"):
            try:
                answer = await ended_by(hook.call(rollout.args, sample), seconds=limit_s)
                sample = sample if answer is None else answer
            except Overran:
                fail(sample, Failure.HOOK, _late(hook, limit_s))
    return sample


async def _finish_sample(rollout: Rollout, sample: Sample) -> list[Sample]:
    cfg = rollout.cfg
    sample.rollout_id = rollout.rollout_id
    if sample.response_length and cfg.rollout.mask_offpolicy and not rollout.evaluation:
        sample.loss_mask = [0] * sample.response_length
    if sample.status not in (Status.PENDING, Status.ABORTED):
        return [sample]
    own = cfg.rollout.plugin("custom_generate_path")
    if path := sample.generate_function_path:
        own = Plugin("Sample.generate_function_path", path, GENERATE)
    if own is not None:
        return await _generate_by(own, rollout, sample)
    try:
        await generate(rollout.args, sample, sampling_params(rollout, sample))
    except RequestFailed as error:
        fail(sample, Failure.REQUEST, error)
    return [sample]


async def _generate_by(own: Plugin, rollout: Rollout, sample: Sample) -> list[Sample]:
    """The samples that a generation function makes before its deadline.

    After an abort the deadline is shorter. If it ends the function, a later rollout calls the
    function again with the same sample.
    """
    limit_s, before = rollout.cfg.rollout.generate_timeout_s, _copy(sample)
    params = sampling_params(rollout, sample)
    work = own.call(rollout.args, sample, params, evaluation=rollout.evaluation)
    with failing([sample], Failure.GENERATION, f"{own.named_by} {own.path}"):
        try:
            made = await ended_by(
                work, seconds=limit_s, stopped=rollout.stopped, grace_s=ABORT_GRACE_S
            )
            return made if isinstance(made, list) else [made]
        except RequestFailed as error:
            fail(sample, Failure.REQUEST, error)
        except Overran:
            fail(before, Failure.GENERATION_TIMEOUT, _late(own, limit_s))
            return [before]  # the function may still write to the other
        except Stopped:
            return [before]
    return [sample]


def _late(function: Plugin, limit_s: float) -> str:
    return f"{function.path} took longer than {limit_s:g} s (--generate-timeout-secs)"


def _copy(sample: Sample) -> Sample:
    """A copy with its own lists and dicts; their entries are shared."""
    values = {f.name: stored(sample, f.name) for f in fields(sample)}
    return Sample(**{n: copy(v) if isinstance(v, list | dict) else v for n, v in values.items()})


def sampling_params(rollout: Rollout, sample: Sample) -> dict[str, Any]:
    """The --rollout-* sampling flags under the engine's names.

    Requests have a seed only under --vllm-enable-deterministic-inference, because an engine samples
    requests with seeds one by one.
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
    """Lets the engine continue `sample` after its present tokens. The new tokens carry loss.

    `sampling_params["max_tokens"]` limits the whole response, including earlier parts;
    "max_context_len" limits prompt and response together. Sets the sample's tokens,
    log-probabilities, weight versions, text and status. Raises RequestFailed, and PluginError
    outside a rollout.
    """
    rollout = current_rollout()
    params = dict(sampling_params)
    context = params.pop("max_context_len", None)
    if not len(stored(sample, "tokens")):
        sample.tokens = _prompt_tokens(rollout, sample)
    left = params["max_tokens"] - sample.response_length
    if context is not None:
        left = min(left, context - len(stored(sample, "tokens")))
    if left <= 0:
        sample.status = Status.TRUNCATED
        return sample
    params["max_tokens"] = left
    if params.get("seed") is not None:
        params["seed"] += _SEED_STRIDE * sample.response_length
    number = id(sample) if sample.index is None else sample.index
    session = sample.session_id or f"{rollout.rollout_id}-{number}"
    plain = bool(params.get("skip_special_tokens"))
    # The engine knows the text of a whole response only. A client would need 5 ms for 8k tokens.
    text = None if sample.response_length else wire.PLAIN if plain else wire.ALL
    generation = await rollout.client.generate(
        listed(sample, "tokens"), params, session, text, _first_version(sample)
    )
    append(sample, generation)
    if generation.text is not None:
        sample.response = generation.text
    elif len(generation):
        sample.response = _text(rollout.tokenizer, sample, skip_special_tokens=plain)
    return sample


def _first_version(sample: Sample) -> int | None:
    """The weight version of the oldest token that an engine made; None if there is none."""
    return min(distinct(sample, "weight_versions") - {UNKNOWN_VERSION}, default=None)


def _text(tokenizer: Any, sample: Sample, *, skip_special_tokens: bool = False) -> str:
    """The text of the response."""
    ids = listed(sample, "tokens")[sample.prompt_length :]
    return chat.decode(tokenizer, ids, skip_special_tokens=skip_special_tokens)


def _prompt_tokens(rollout: Rollout, sample: Sample) -> list[int]:
    """Tokenises a prompt (text or messages) that the data source has not tokenised."""
    text = sample.prompt
    if not isinstance(text, str):
        kwargs = sample.apply_chat_template_kwargs or rollout.cfg.data.apply_chat_template_kwargs
        text = chat.render_prompt(rollout.tokenizer, text, template_kwargs=kwargs)
    return chat.encode(rollout.tokenizer, [text])[0]


def append(sample: Sample, generation: Any) -> None:
    """Appends an answer's tokens to a sample. Each [R] list keeps one entry per token."""
    count = len(stored(generation, "token_ids"))
    if sample.loss_mask is not None:
        sample.loss_mask = sample.loss_mask + [1] * count
    extend(sample, "tokens", stored(generation, "token_ids"))
    extend(sample, "rollout_log_probs", stored(generation, "log_probs"))
    extend(sample, "weight_versions", stored(generation, "weight_versions"))
    sample.response_length += count
    sample.status = generation.status


def append_observation(sample: Sample, text: str) -> None:
    """Appends text that the model did not write, such as a tool's answer, without loss.

    For custom generation functions. Earlier tokens stay as they are. The observation's tokens get
    log-probability 0 and UNKNOWN_VERSION; training reads neither where there is no loss.
    """
    tokenizer = current_rollout().tokenizer
    ids = chat.encode(tokenizer, [text])[0]
    count = len(ids)
    if sample.loss_mask is None:
        sample.loss_mask = [1] * sample.response_length
    sample.loss_mask = sample.loss_mask + [0] * count
    extend(sample, "tokens", Numbers(np.asarray(ids, np.int32)))
    extend(sample, "rollout_log_probs", Numbers(np.zeros(count, np.float32)))
    extend(sample, "weight_versions", Runs((UNKNOWN_VERSION,), (count,)))
    sample.response_length += count
    sample.response = _text(tokenizer, sample)
