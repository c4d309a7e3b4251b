"""Who grades a sample, and what becomes of one that cannot be graded.

The first that is set: `sample.custom_rm_path`, --custom-rm-path, `sample.metadata["rm_type"]`,
--rm-type. A sample without a reward is failed with its reason: it is not a wrong answer.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import logging
import math
import random
import re
from typing import Any

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.config.rules import DATA_SOURCE, VLLM_ROLLOUT
from vime.errors import PluginError
from vime.rollout.plugins import GROUP_REWARD, REWARD, load_function
from vime.rollout.rm_hub.answers import last_boxed
from vime.rollout.rm_hub.deepscaler import has_mark
from vime.rollout.rm_hub.pool import GradingFailed, GradingTimeout, shared_pool
from vime.types import FINISHED, Group, Sample, Status

logger = logging.getLogger(__name__)

BOXED = "boxed_"  # prefix of an --rm-type: grade what the last \boxed{} holds
LOCAL = ("deepscaler", "math", "dapo", "f1", "gpqa", "ifeval")  # modules with quick() and grade()
NEED_LABEL = ("deepscaler", "math", "dapo", "f1")  # nothing is right or wrong without one
RM_TYPES = (*LOCAL, "random", "remote_rm")

_END_MARKS = re.compile(r"(?:\s*(?:<\|[^|<>\s]{1,40}\|>|</s>|<eos>|<end_of_turn>))+\s*$")

TIMEOUT = "grading timeout"
FAILED = "grading failed"


async def grade_group(args: Any, group: Group) -> None:
    """Gives each finished sample of a group its reward, or fails it with the reason."""
    todo = [s for s in group if s.reward is None and s.status in FINISHED]
    if not todo:
        return
    path = args.config.reward.custom_rm_path
    if args.config.reward.group_rm and path:
        await _grade_together(args, todo, path)
    else:
        await asyncio.gather(*(_grade_or_fail(args, sample) for sample in todo))


async def grade(args: Any, sample: Sample, **kwargs: Any) -> float | dict[str, Any]:
    """The reward of one sample. Raises GradingFailed."""
    path = sample.custom_rm_path or args.config.reward.custom_rm_path
    if path:
        return await _custom(args, load_function(path, REWARD), sample)
    rm_type = sample.metadata.get("rm_type") or args.config.reward.rm_type
    if not rm_type:
        raise PluginError(
            "nothing grades the samples: set --rm-type or --custom-rm-path, or give each prompt "
            'a metadata["rm_type"].'
        )
    response = without_end_mark(sample.response)
    if rm_type.startswith(BOXED):
        rm_type, response = rm_type.removeprefix(BOXED), last_boxed(response) or ""
    if rm_type == "random":
        return float(random.Random(f"{args.config.data.seed}/{sample.index}").randint(0, 1))
    if rm_type == "remote_rm":
        remote = importlib.import_module("vime.rollout.rm_hub.remote_rm")
        return await remote.grade(args, sample)
    if rm_type not in LOCAL:
        raise PluginError(f"unknown reward type {rm_type!r}; there are: {', '.join(RM_TYPES)}.")
    if rm_type in NEED_LABEL and sample.label is None:
        raise GradingFailed(f"{rm_type} compares with a label, and the prompt has none")
    grader = importlib.import_module(f"vime.rollout.rm_hub.{rm_type}")
    reward = grader.quick(response, sample.label, sample.metadata)
    if reward is not None:
        return reward
    settings = args.config.reward
    pool = shared_pool(settings.workers, settings.timeout_s)
    future = pool.submit(rm_type, response, sample.label, sample.metadata)
    return await asyncio.wrap_future(future)


def without_end_mark(response: str) -> str:
    """The text without the special tokens at its end, which are no part of an answer."""
    return _END_MARKS.sub("", response)


async def _grade_or_fail(args: Any, sample: Sample) -> None:
    try:
        _set_reward(sample, await grade(args, sample))
    except GradingFailed as error:
        _fail(sample, error)


async def _grade_together(args: Any, samples: list[Sample], path: str) -> None:
    try:
        rewards = await _custom(args, load_function(path, GROUP_REWARD), samples)
    except GradingFailed as error:
        for sample in samples:
            _fail(sample, error)
        return
    if not isinstance(rewards, (list, tuple)) or len(rewards) != len(samples):
        raise PluginError(
            f"--custom-rm-path {path} under --group-rm must return a list of {len(samples)} "
            f"rewards, one a sample; it returned {rewards!r}."
        )
    for sample, reward in zip(samples, rewards, strict=True):
        _set_reward(sample, reward)


async def _custom(args: Any, function: Any, subject: Any) -> Any:
    """A user's grader: an async one on the loop, a plain one in a thread; both with a deadline."""
    limit_s = args.config.engine.request_timeout_s
    if inspect.iscoroutinefunction(function):
        work = function(args, subject)
    else:
        work = asyncio.to_thread(function, args, subject)
    try:
        reward = await asyncio.wait_for(work, limit_s)
        if inspect.isawaitable(reward):  # a plain function that returns a coroutine
            reward = await asyncio.wait_for(reward, limit_s)
    except TimeoutError:
        raise GradingTimeout(
            f"the custom grader took longer than {limit_s:g} s (--router-request-timeout-secs)"
        ) from None
    return reward


def _set_reward(sample: Sample, reward: Any) -> None:
    value = reward if isinstance(reward, dict) else _to_float(reward)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        _fail(sample, GradingFailed(f"the grader gave {reward!r}, which is no reward"))
    else:
        sample.reward = value


def _to_float(reward: Any) -> float | None:
    try:
        return float(reward)
    except (TypeError, ValueError):
        return None


def _fail(sample: Sample, error: GradingFailed) -> None:
    kind = TIMEOUT if isinstance(error, GradingTimeout) else FAILED
    sample.status, sample.failure = Status.FAILED, f"{kind}: {error}"


def warn_of_missing_marks(args: Any, samples: list[Sample]) -> bool:
    """deepscaler gives 0 where the thinking mark is missing: says so when it is everywhere."""
    graded = [sample for sample in samples if sample.reward is not None]
    if args.config.reward.custom_rm_path or args.config.reward.rm_type != "deepscaler":
        return False
    if not graded or any(s.reward != 0 or has_mark(s.response) for s in graded):
        return False
    logger.warning(
        "EVERY REWARD OF THIS ROLLOUT IS 0, because --rm-type deepscaler wants </think> or "
        "###Response before the answer and none of the %d responses has either. Use --rm-type math "
        "for a model that does not think in tags.",
        len(graded),
    )
    return True


def check_rewards(cfg: Config) -> list[str]:
    """What is wrong with the graders of rollouts and evaluations; empty when nothing is."""
    reward = cfg.reward
    problems = _problems_of("--rm-type", reward.rm_type, reward.reward_key, reward.rm_url)
    is_dapo = (reward.rm_type or "").removeprefix(BOXED) == "dapo" and not reward.custom_rm_path
    nonnegative = cfg.algorithm.estimator.nonnegative_rewards
    if is_dapo and nonnegative and reward.reward_key == "score":
        problems.append(
            f"--rm-type {reward.rm_type} scores a wrong answer -1, and --advantage-estimator "
            f"{cfg.algorithm.advantage_estimator} wants rewards from 0 up. Give --reward-key acc."
        )
    if _takes_labels_from_rows(cfg) and not reward.custom_rm_path:
        problems += _missing_label("--rm-type", reward.rm_type, cfg.data.label_key, "--label-key")
    if cfg.eval.config is not None:
        for dataset in eval_datasets(cfg):
            name = f"--eval-config, {dataset.name}: rm_type"
            problems += _problems_of(name, dataset.rm_type, dataset.reward_key, reward.rm_url)
            if not (dataset.custom_rm_path or dataset.custom_generate_function_path):
                problems += _missing_label(name, dataset.rm_type, dataset.label_key, "label_key:")
    return list(dict.fromkeys(problems))


def _takes_labels_from_rows(cfg: Config) -> bool:
    """Whether nothing but --prompt-data gives the default rollout its labels."""
    rollout, data = cfg.rollout, cfg.data
    own = rollout.function_path == VLLM_ROLLOUT and rollout.custom_generate_path is None
    from_file = data.data_source_path == DATA_SOURCE and data.prompt_data is not None
    return own and from_file and cfg.debug.load_rollout_data is None


def _missing_label(name: str, rm_type: str | None, key: str | None, where: str) -> list[str]:
    if key is not None or (rm_type or "").removeprefix(BOXED) not in NEED_LABEL:
        return []
    return [f"{name} {rm_type} compares answers with a label. Add {where} FIELD, which holds it."]


def _problems_of(
    name: str, rm_type: str | None, reward_key: str | None, rm_url: str | None
) -> list[str]:
    if rm_type is None:
        return []
    kind, problems = rm_type.removeprefix(BOXED), []
    if kind not in RM_TYPES:
        problems.append(
            f"{name} {rm_type} is unknown. Choose one of {', '.join(RM_TYPES)}, with "
            f"{BOXED} in front where only the boxed part counts, or write a --custom-rm-path."
        )
    if kind == "math" and importlib.util.find_spec("math_verify") is None:
        problems.append(f"{name} math needs the package math-verify. Install it.")
    if kind == "dapo" and not reward_key:
        problems.append(f"{name} dapo gives a dict of score and acc. Add --reward-key score.")
    if kind == "remote_rm" and not rm_url and not name.startswith("--rm-type"):
        problems.append(f"{name} remote_rm needs a server. Add --rm-url http://HOST:PORT/PATH.")
    return problems
