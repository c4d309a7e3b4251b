"""Filters for --dynamic-sampling-filter-path: keep a finished group, or drop it and sample on."""

from __future__ import annotations

from typing import Any

from vime.types import DynamicFilterOutput, Sample


def check_reward_nonzero_std(args: Any, samples: list[Sample], **kwargs: Any):
    """Keeps a group whose rewards are not all equal (DAPO, arXiv:2503.14476)."""
    import torch  # it takes seconds, and the check before a run imports this file

    rewards = [sample.get_reward_value(args) for sample in samples]
    return torch.tensor(rewards, dtype=torch.float).std() > 0.0


def as_verdict(answer: Any, samples: list[Sample], args: Any) -> DynamicFilterOutput:
    """A filter's answer with a reason to count it by.

    A bool or a tensor bool names no reason; the reward is named in its place where all share it.
    """
    if isinstance(answer, DynamicFilterOutput):
        return DynamicFilterOutput(bool(answer.keep), answer.reason)
    if bool(answer):
        return DynamicFilterOutput(True)
    rewards = {sample.get_reward_value(args) for sample in samples}
    reason = f"zero_std_{rewards.pop():g}" if len(rewards) == 1 else "filtered"
    return DynamicFilterOutput(False, reason)
