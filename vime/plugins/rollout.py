"""The hooks of a rollout, from prompts to graded groups, each with the check of its answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vime.number_lists import stored
from vime.plugins.hook import Hook, described
from vime.types import DynamicFilterOutput, RolloutFnEvalOutput, RolloutFnTrainOutput, Sample

_GROUPS = "a list of groups, each a non-empty list of Sample"


def _groups_problem(made: Any) -> str | None:
    if not isinstance(made, list | tuple) or not made or isinstance(made[0], Sample):
        return f"returned {described(made)}"
    for i, group in enumerate(made):
        if not isinstance(group, list | tuple) or not group:
            return f"returned {described(group)} as group {i}"
        for sample in group:
            if not isinstance(sample, Sample):
                return f"returned {described(sample)} in group {i}"
    return None


def _ids(groups: Any) -> list[int]:
    return [id(sample) for group in groups for sample in group]


def _new_groups(made: Any, num_samples: int) -> str | None:
    if problem := _groups_problem(made):
        return problem
    if any(sample.index is None for group in made for sample in group):
        return "returned a Sample without index"
    ids = _ids(made)
    return "returned one Sample object twice" if len(set(ids)) < len(ids) else None


DATA_SOURCE = Hook(
    shape="a class with get_samples(num_samples), add_samples(groups), save(rollout_id), "
    "load(rollout_id), __len__; built as C(args)",
    returns="an object with get_samples, add_samples, save, load and __len__",
    positional=1,
    methods={
        "get_samples": (f"{_GROUPS}, every Sample a new object with an index", _new_groups),
        "add_samples": ("None", None),
        "save": ("None", None),
        "load": ("None", None),
        "__len__": ("the number of prompts", None),
    },
)


def _held(args: Any, rollout_id: int, buffer: Any, num_samples: int) -> set[int]:
    return set(_ids(buffer))


def _taken_groups(
    made: Any, args: Any, rollout_id: int, buffer: Any, num_samples: int, *, before: set[int]
) -> str | None:
    if problem := None if made == [] else _groups_problem(made):
        return problem
    if len(made) > num_samples:
        return f"returned {len(made)} groups, but at most {num_samples} were asked for"
    ids = _ids(made)
    if not before.issuperset(ids):
        return "returned samples that were not in the buffer"
    if len(set(ids)) < len(ids):
        return "returned one sample twice"
    return None if set(ids).isdisjoint(_ids(buffer)) else "left the returned groups in the buffer"


BUFFER_FILTER = Hook(
    shape="f(args, rollout_id, buffer, num_samples) -> list of groups",
    returns="at most num_samples groups, which it takes out of the buffer",
    positional=4,
    remember=_held,
    check=_taken_groups,
)


def _rollout(
    made: Any, args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> str | None:
    if evaluation:
        is_output = isinstance(made, RolloutFnEvalOutput) and isinstance(made.data, dict)
        return None if is_output else f"returned {described(made)} for an evaluation"
    return _groups_problem(made.samples if isinstance(made, RolloutFnTrainOutput) else made)


ROLLOUT = Hook(
    shape="f(args, rollout_id, data_source, evaluation=False) -> RolloutFnTrainOutput, list of "
    "groups, or RolloutFnEvalOutput",
    returns=f"RolloutFnTrainOutput or {_GROUPS}; for an evaluation RolloutFnEvalOutput",
    positional=3,
    keywords=("evaluation",),
    check=_rollout,
)


def _sample_problem(made: Any, given: Sample) -> str | None:
    """A new Sample must stay in the group of the given Sample, and its lists must fit together."""
    if not isinstance(made, Sample):
        return f"returned {described(made)}"
    if made.index is None and given.index is not None:
        return "returned a Sample without index"
    if made.group_index != given.group_index:
        return f"returned a Sample of group {made.group_index} for group {given.group_index}"
    size, num_tokens = made.response_length, len(stored(made, "tokens"))
    if not 0 <= size <= num_tokens:
        return f"returned a Sample with response_length {size} and {num_tokens} tokens"
    for name in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
        values = stored(made, name)
        if values is not None and len(values) != size:
            return f"returned a Sample with {len(values)} {name} for {size} response tokens"
    return None


def _generated(
    made: Any, args: Any, sample: Sample, sampling_params: Any, evaluation: bool = False
) -> str | None:
    if made == []:
        return "returned an empty list"
    parts = made if isinstance(made, list) else [made]
    return next(filter(None, (_sample_problem(part, sample) for part in parts)), None)


GENERATE = Hook(
    shape="async f(args, sample, sampling_params[, evaluation]) -> Sample or list of Sample",
    returns="the Sample or a non-empty list of Sample, each in the group of the given one",
    positional=3,
    optional=("evaluation",),
    check=_generated,
    may_await=True,
)


def reward_problem(made: Any) -> str | None:
    """The problem of a reward, which must be a finite number or a dict of figures.

    A bool, a NumPy number, and a tensor or array with one element are numbers.
    """
    if isinstance(made, dict):
        return None if made else "returned an empty dict, which is no reward"
    try:
        is_reward = math.isfinite(float(made))
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: torch's
        is_reward = False
    return None if is_reward else f"returned {described(made)}, which is no reward"


def _reward(made: Any, args: Any, sample: Sample) -> str | None:
    return reward_problem(made)


REWARD = Hook(
    shape="async f(args, sample, **kwargs) -> number or dict",
    returns="a finite number, or a dict from which --reward-key takes one",
    positional=2,
    check=_reward,
    may_await=True,
    in_thread=True,
)


def _group_reward(made: Any, args: Any, samples: list[Sample]) -> str | None:
    if not isinstance(made, list | tuple):
        return f"returned {described(made)} for {len(samples)} samples"
    is_wrong = len(made) != len(samples)
    return f"returned {len(made)} rewards for {len(samples)} samples" if is_wrong else None


GROUP_REWARD = Hook(
    shape="async f(args, samples, **kwargs) -> list of numbers or dicts",
    returns="a list with one reward for each sample",
    positional=2,
    check=_group_reward,
    may_await=True,
    in_thread=True,
)


def _kept_or_replaced(made: Any, args: Any, sample: Sample) -> str | None:
    return None if made is None else _sample_problem(made, sample)


SAMPLE_HOOK = Hook(
    shape="async f(args, sample) -> None or Sample",
    returns="None to keep the sample, or a Sample of the same group",
    positional=2,
    check=_kept_or_replaced,
    may_await=True,
)


def _is_yes_or_no(value: Any) -> bool:
    """A bool or a number, of Python, NumPy or torch."""
    if isinstance(value, bool | int | float):
        return not math.isnan(value)
    has_one = hasattr(value, "item") and math.prod(np.shape(value)) == 1
    return has_one and _is_yes_or_no(value.item())


def _verdict(made: Any, args: Any, samples: list[Sample]) -> str | None:
    keep = made.keep if isinstance(made, DynamicFilterOutput) else made
    return None if _is_yes_or_no(keep) else f"returned {described(keep)} as its verdict"


DYNAMIC_FILTER = Hook(
    shape="async f(args, samples, **kwargs) -> bool, tensor or DynamicFilterOutput",
    returns="a bool, a tensor of one bool or a DynamicFilterOutput: whether to keep the group",
    positional=2,
    check=_verdict,
    may_await=True,
)


def _members(args: Any, groups: Any) -> list[list[int]]:
    return [_ids([group]) for group in groups]


def _same_groups(made: Any, args: Any, groups: Any, *, before: list[list[int]]) -> str | None:
    if made is not None and made is not groups:
        return f"returned {described(made)}, which vime does not use"
    return None if _members(args, groups) == before else "removed, replaced or moved samples"


SAMPLE_FILTER = Hook(
    shape="async f(args, groups)",
    returns="None, and set sample.remove_sample where a sample gets no loss",
    positional=2,
    remember=_members,
    check=_same_groups,
    may_await=True,
)


def _nothing(made: Any, args: Any, samples: list[Sample], data_source: Any) -> str | None:
    is_unused = made is not None and made is not samples
    return f"returned {described(made)}, which vime does not use" if is_unused else None


ALL_SAMPLES = Hook(
    shape="async f(args, all_samples, data_source)",
    returns="None, and change samples in place",
    positional=3,
    check=_nothing,
    may_await=True,
)
