"""Grades samples. A sample that cannot be graded fails, which differs from a wrong answer.

The grader is the first of these that is set: `sample.custom_rm_path`, --custom-rm-path,
`sample.metadata["rm_type"]`, --rm-type.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import re
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.config.sections.prompts import DATA_SOURCE_PATH
from vime.config.sections.rollout import ENGINE_ROLLOUTS
from vime.errors import ReturnError
from vime.observe.spans import span
from vime.plugins.hook import Plugin
from vime.plugins.rollout import REWARD, reward_problem
from vime.rollout.deadline import Overran, ended_by
from vime.rollout.failures import Failure, fail, failing
from vime.rollout.rm_hub.answers import last_boxed
from vime.rollout.rm_hub.grader import Grader, GradingFailed, GradingTimeout
from vime.rollout.rm_hub.pool import shared_pool
from vime.rollout.rm_hub.registry import BOXED, grader_of, problems_of, refusal
from vime.types import FINISHED, Group, Sample, Status

logger = logging.getLogger(__name__)

# The spellings of end marks in the tokenizers of the families in docs/models.md, and their kin.
_END_MARK = re.compile(
    r"(?:<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</s>|<(?:eos|EOS|eod|EOT|pad|end_of_turn|turn\|)>"
    r"|<end_of_utterance>|\[(?:EOS|EOT|PAD)\]|\[e~\[)\Z"
)
_LONGEST_END_MARK = 44


async def grade_group(args: Any, group: Group, *, as_number: bool = True) -> None:
    """Gives each finished sample of a group its reward, or fails it with the reason.

    as_number  whether a dict must have a number under --reward-key. It need not if
               --custom-reward-post-process-path reads the dict
    """
    todo = [s for s in group if s.reward is None and s.status in FINISHED]
    if todo and args.config.reward.group_rm:
        await _grade_together(args, todo, args.config.reward.plugin("custom_rm_path"))
    elif todo:
        await asyncio.gather(*(_grade_or_fail(args, sample) for sample in todo))
    check_group(args, group, as_number=as_number)


def check_group(args: Any, group: Group, *, as_number: bool = True) -> None:
    """Makes each reward a finite float or a dict. If that is impossible, fails the sample.

    Rewards also come from generation functions and sample hooks.
    """
    for sample in group:
        if sample.reward is None or sample.status is Status.FAILED:
            continue
        if problem := _problem(args, sample.reward, as_number):
            sample.reward = None
            fail(sample, Failure.GRADING, f"the grader {problem}")
        elif not isinstance(sample.reward, dict):
            sample.reward = float(sample.reward)


def _problem(args: Any, reward: Any, as_number: bool) -> str | None:
    problem = reward_problem(reward)
    if problem or not isinstance(reward, dict) or not as_number:
        return problem
    key = args.config.reward.reward_key
    if key is None:
        return f"returned a dict of {_names(reward)}. Add --reward-key with one of them"
    if key not in reward:
        return f"returned a dict of {_names(reward)}, without --reward-key {key}"
    value = reward[key]
    problem = "returned a dict" if isinstance(value, dict) else reward_problem(value)
    return problem and f"{problem}, under --reward-key {key}"


def _names(reward: dict) -> str:
    return ", ".join(map(str, reward))[:200]


async def grade(args: Any, sample: Sample, **kwargs: Any) -> float | dict[str, Any]:
    """The reward of one sample. Raises GradingFailed."""
    grader = None
    if sample.custom_rm_path:
        grader = Plugin("Sample.custom_rm_path", sample.custom_rm_path, REWARD)
    elif args.config.reward.custom_rm_path:
        grader = args.config.reward.plugin("custom_rm_path")
    if grader is not None:
        try:
            return await _in_time(args, grader, sample)
        except ReturnError as error:
            raise GradingFailed(str(error)) from error
    rm_type = sample.metadata.get("rm_type") or args.config.reward.rm_type
    if not rm_type:
        raise GradingFailed(
            "there is no grader: set --rm-type or --custom-rm-path, or give each prompt "
            'a metadata["rm_type"].'
        )
    return await _by_registry(args, sample, rm_type)


async def _by_registry(args: Any, sample: Sample, rm_type: str) -> float | dict[str, Any]:
    grader = grader_of(rm_type)
    if grader is None:
        raise GradingFailed(f"the reward type {rm_type!r} {refusal(rm_type)}")
    name, response = rm_type.removeprefix(BOXED), without_end_mark(sample.response)
    if problem := refusal(rm_type):
        raise GradingFailed(f"{rm_type} {problem}")
    if rm_type.startswith(BOXED):
        response = last_boxed(response) or ""
    if grader.needs_label and sample.label is None:
        raise GradingFailed(f"{name} compares with a label, and the prompt has no label")
    if grader.takes_sample:
        if rm_type.startswith(BOXED):
            sample = replace(sample, response=response)
        with _span(sample):
            return await grader.grade(args, sample)
    quick = grader.quick and grader.quick(response, sample.label, sample.metadata)
    if quick is not None:
        return quick
    settings = args.config.reward
    pool = shared_pool(settings.workers, settings.timeout_s)
    future = pool.submit(name, response, sample.label, sample.metadata)
    with _span(sample):  # a quick answer has none: it takes as long as its span
        return await asyncio.wrap_future(future)


def _span(sample: Sample) -> AbstractContextManager[None]:
    return span("grade", "graders", sample=sample.index, group=sample.group_index)


def without_end_mark(response: str) -> str:
    """The response without the special tokens at its end. They are not part of the answer."""
    end, marks = len(response), 0
    while True:
        start = end
        while start and response[start - 1].isspace():
            start -= 1
        found = _END_MARK.search(response, max(0, start - _LONGEST_END_MARK), start)
        if found is None:
            return response[:start] if marks else response
        end, marks = found.start(), marks + 1


async def _grade_or_fail(args: Any, sample: Sample) -> None:
    with failing([sample], Failure.GRADING, "the grader"):
        try:
            sample.reward = await grade(args, sample)
            if sample.reward is None:
                raise GradingFailed("the grader returned None, which is no reward")
        except GradingFailed as error:
            _fail(sample, error)


async def _grade_together(args: Any, samples: list[Sample], grader: Plugin) -> None:
    with failing(samples, Failure.GRADING, f"{grader.named_by} {grader.path}"):
        try:
            rewards = await _in_time(args, grader, samples)
        except GradingFailed as error:
            for sample in samples:
                _fail(sample, error)
            return
        for sample, reward in zip(samples, rewards, strict=True):
            sample.reward = reward
            if reward is None:
                _fail(sample, GradingFailed("the grader returned None, which is no reward"))


async def _in_time(args: Any, grader: Plugin, subject: Any) -> Any:
    """The answer of a user's grader. Raises GradingTimeout, and PluginError if it is no reward."""
    limit_s = args.config.engine.request_timeout_s
    try:
        with _span(subject[0] if isinstance(subject, list) else subject):
            return await ended_by(grader.call(args, subject), seconds=limit_s)
    except Overran:
        raise GradingTimeout(
            f"the custom grader took longer than {limit_s:g} s (--router-request-timeout-secs)"
        ) from None


def _fail(sample: Sample, error: GradingFailed) -> None:
    late = isinstance(error, GradingTimeout)
    fail(sample, Failure.GRADING_TIMEOUT if late else Failure.GRADING, error)


def warn_of_missing_marks(args: Any, samples: list[Sample]) -> bool:
    """Warns when every reward is 0 because no response has a mark that the grader requires."""
    reward = args.config.reward
    grader = grader_of(reward.rm_type or "")
    if reward.custom_rm_path or grader is None or not grader.marks:
        return False
    graded = [sample for sample in samples if sample.reward is not None]
    if not graded or any(s.reward != 0 or _has_mark(s, grader) for s in graded):
        return False
    logger.warning(
        "EVERY REWARD OF THIS ROLLOUT IS 0: --rm-type %s requires %s before the answer, and none "
        "of the %d responses has it. Use --rm-type math for a model that does not think in tags.",
        reward.rm_type,
        " or ".join(grader.marks),
        len(graded),
    )
    return True


def _has_mark(sample: Sample, grader: Grader) -> bool:
    return any(mark in sample.response for mark in grader.marks)


def check_rewards(cfg: Config) -> list[str]:
    """Problems of the graders of rollouts and evaluations, in the user's words."""
    reward = cfg.reward
    problems = _problems_of("--rm-type", reward.rm_type, reward.reward_key, reward.rm_url)
    if not reward.custom_rm_path:
        problems += _unfit_key("--rm-type", reward.rm_type, reward.reward_key)
        problems += _too_low(cfg)
        if _takes_labels_from_rows(cfg):
            problems += _no_label("--rm-type", reward.rm_type, cfg.data.label_key, "--label-key")
    if cfg.eval.config is not None:
        for dataset in eval_datasets(cfg):
            name, own = f"--eval-config, {dataset.name}: rm_type", dataset.cfg
            rm_type, key = own.reward.rm_type, own.reward.reward_key
            problems += _problems_of(name, rm_type, key, reward.rm_url)
            if own.reward.custom_rm_path:
                continue
            problems += _unfit_key(name, rm_type, key)
            if not own.rollout.custom_generate_path:
                problems += _no_label(name, rm_type, own.data.label_key, "label_key:")
    return list(dict.fromkeys(problems))


def _problems_of(
    name: str, rm_type: str | None, reward_key: str | None, rm_url: str | None
) -> list[str]:
    """Problems of a grader's settings, and of a package that it needs and this machine lacks."""
    problems = problems_of(name, rm_type, reward_key, rm_url)
    grader = grader_of(rm_type or "")
    package = grader and grader.needs_package
    if package and importlib.util.find_spec(package) is None:
        named = package.replace("_", "-")
        problems.append(f"{name} {rm_type} needs the package {named}. Install it.")
    return problems


def _unfit_key(name: str, rm_type: str | None, reward_key: str | None) -> list[str]:
    grader = grader_of(rm_type or "")
    keys = grader.reward_keys if grader else ()
    if not keys or not reward_key or reward_key in keys:
        return []
    return [
        f"{name} {rm_type} gives a dict of {' and '.join(keys)}, and --reward-key is {reward_key}. "
        f"Give --reward-key {keys[0]}."
    ]


def _too_low(cfg: Config) -> list[str]:
    """A problem if the estimator needs rewards of at least 0 and the grader gives lower rewards."""
    rm_type, key = cfg.reward.rm_type, cfg.reward.reward_key
    grader = grader_of(rm_type or "")
    if grader is None or not cfg.algorithm.estimator.nonnegative_rewards:
        return []
    if grader.reward_keys and key not in grader.reward_keys or grader.lowest(key) >= 0:
        return []
    fit = [f"--reward-key {k}" for k in grader.reward_keys if grader.lowest(k) >= 0]
    return [
        f"--rm-type {rm_type} scores a wrong answer {grader.lowest(key):g}, and "
        f"--advantage-estimator {cfg.algorithm.advantage_estimator} needs rewards of at least 0. "
        f"Give {(fit or ['another --rm-type'])[0]}."
    ]


def _no_label(name: str, rm_type: str | None, key: str | None, where: str) -> list[str]:
    grader = grader_of(rm_type or "")
    if key is not None or grader is None or not grader.needs_label:
        return []
    return [
        f"{name} {rm_type} compares answers with a label. Add {where} FIELD: "
        "the field with the label."
    ]


def _takes_labels_from_rows(cfg: Config) -> bool:
    """Whether the labels can come from --prompt-data only."""
    rollout, data = cfg.rollout, cfg.data
    own = rollout.function_path in ENGINE_ROLLOUTS and rollout.custom_generate_path is None
    from_file = data.data_source_path == DATA_SOURCE_PATH and data.prompt_data is not None
    return own and from_file and cfg.debug.load_rollout_data is None
