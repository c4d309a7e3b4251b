r"""`--rm-type math`: 1 if the last boxed answer equals the label, else 0.

Plain numbers are compared by their exact values, anything else by math-verify.
"""

from __future__ import annotations

from typing import Any

from vime.rollout.rm_hub import symbolic
from vime.rollout.rm_hub.answers import Answer, last_boxed, same
from vime.rollout.rm_hub.grader import Grader


def quick(response: str, label: str | None, metadata: dict[str, Any]) -> float | None:
    """The reward, if it needs no algebra; otherwise None."""
    answer = last_boxed(response)
    if answer is None or label is None:
        return 0.0
    verdict = same(Answer.read(answer), _truth(label))
    return None if verdict is None else float(verdict)


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> float:
    reward = quick(response, label, metadata)
    if reward is not None:
        return reward
    return float(symbolic.equal(Answer.read(last_boxed(response)), _truth(label)))


GRADER = Grader(
    grade,
    quick,
    gives="1 if the last box equals the label, by value or by math-verify",
    needs_label=True,
    takes_box=True,
    needs_package="math_verify",
)


def _truth(label: str) -> Answer:
    boxed = last_boxed(label)
    return Answer.read(label if boxed is None else boxed)
