r"""`--rm-type math`: 1 if the last boxed answer equals the label by math-verify, else 0."""

from __future__ import annotations

from typing import Any

from vime.rollout.rm_hub.answers import last_boxed, normalise, same_number
from vime.rollout.rm_hub.grader import Grader


def quick(response: str, label: str | None, metadata: dict[str, Any]) -> float | None:
    """The reward, if it needs no algebra; otherwise None."""
    answer = last_boxed(response)
    if answer is None or label is None:
        return 0.0
    a, b = normalise(answer), normalise(_truth(label))
    if a == b:
        return float(bool(a))
    same = same_number(a, b)
    return None if same is None else float(same)


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> float:
    reward = quick(response, label, metadata)
    if reward is not None:
        return reward
    from math_verify import parse, verify

    # The worker process has a deadline already, and math-verify's alarms would disturb it.
    truth = parse(f"${_truth(label)}$", parsing_timeout=None)
    answer = parse(f"${last_boxed(response)}$", parsing_timeout=None)
    return float(verify(truth, answer, timeout_seconds=None))


GRADER = Grader(
    grade,
    quick,
    gives="1 if the last box equals the label, by math-verify",
    needs_label=True,
    takes_box=True,
    needs_package="math_verify",
)


def _truth(label: str) -> str:
    boxed = last_boxed(label)
    return label.strip().strip("$") if boxed is None else boxed
