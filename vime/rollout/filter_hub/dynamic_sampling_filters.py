"""Filters for --dynamic-sampling-filter-path: keep a finished group, or drop it for another."""

from __future__ import annotations

from typing import Any

from vime.types import DynamicFilterOutput, Sample


def check_reward_nonzero_std(args: Any, samples: list[Sample], **kwargs: Any) -> bool:
    """Keeps a group unless all its rewards are equal (DAPO, arXiv:2503.14476)."""
    return len({sample.get_reward_value(args) for sample in samples}) > 1


def as_verdict(answer: Any, samples: list[Sample], args: Any) -> DynamicFilterOutput:
    """A filter's answer, with the reason under which a dropped group is counted.

    A bool has no reason. The reason is then the common reward, if there is one.
    """
    if isinstance(answer, DynamicFilterOutput):
        return DynamicFilterOutput(bool(answer.keep), answer.reason)
    if bool(answer):
        return DynamicFilterOutput(True)
    rewards = {sample.get_reward_value(args) for sample in samples}
    reason = f"zero_std_{rewards.pop():g}" if len(rewards) == 1 else "filtered"
    return DynamicFilterOutput(False, reason)
