r"""`--rm-type deepscaler`: 1 if the boxed answer after the thinking equals the label, else 0.

As in DeepScaleR's reward, a response without `</think>` or `###Response` has no answer. If the
label is an integer, the answer must be one; if it is a fraction, the answer must be the same
fraction. Only other answers are compared by algebra.
"""

from __future__ import annotations

from typing import Any

from vime.rollout.rm_hub import symbolic
from vime.rollout.rm_hub.answers import decimal, last_boxed, normalise, ratio
from vime.rollout.rm_hub.grader import Grader

MARKS = ("</think>", "###Response")


def quick(response: str, label: str | None, metadata: dict[str, Any]) -> float | None:
    """The reward, if it needs no algebra; otherwise None."""
    answer = _answer(response)
    truth = _truth(label)
    if answer is None or truth is None:
        return 0.0
    same = _compare(normalise(answer), normalise(truth))
    return None if same is None else float(same)


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> float:
    reward = quick(response, label, metadata)
    if reward is not None:
        return reward
    return float(symbolic.equal(normalise(_answer(response)), normalise(_truth(label))))


GRADER = Grader(
    grade,
    quick,
    gives="1 if the box after `</think>` or `###Response` equals the label, by value or algebra",
    needs_label=True,
    takes_box=True,
    marks=MARKS,
    needs_package="sympy",
)


def _answer(response: str) -> str | None:
    for mark in MARKS:
        if mark in response:
            return last_boxed(response.rsplit(mark, 1)[1])
    return None


def _truth(label: str | None) -> str | None:
    if label is None:
        return None
    return last_boxed(label) if "\\boxed" in label else label


def _compare(answer: str, truth: str) -> bool | None:
    if not answer or not truth:
        return False
    if answer == truth:
        return True
    x, y = decimal(answer), decimal(truth)
    if x is not None and y is not None:
        return x == y
    if ratio(answer) is not None and ratio(truth) is not None:
        return False
    if _is_integer(x) != _is_integer(y):
        return False
    return None


def _is_integer(value: Any) -> bool:
    return value is not None and value.denominator == 1
