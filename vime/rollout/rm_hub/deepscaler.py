r"""`--rm-type deepscaler`: 1 if the boxed answer after the thinking equals the label, else 0.

As in DeepScaleR's reward, a response without `</think>` or `###Response` has no answer. If the
label is an integer, the answer must be one; if both are fractions, they must be the same fraction.
Other plain numbers are compared by value, anything else by math-verify.
"""

from __future__ import annotations

from typing import Any

from vime.rollout.rm_hub import symbolic
from vime.rollout.rm_hub.answers import Answer, last_boxed, same
from vime.rollout.rm_hub.grader import Grader
from vime.rollout.rm_hub.numerals import ratio, written_out

MARKS = ("</think>", "###Response")


def quick(response: str, label: str | None, metadata: dict[str, Any]) -> float | None:
    """The reward, if it needs no algebra; otherwise None."""
    answer, truth = _answer(response), _truth(label)
    if answer is None or truth is None:
        return 0.0
    verdict = _same(answer, truth)
    return None if verdict is None else float(verdict)


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> float:
    reward = quick(response, label, metadata)
    if reward is not None:
        return reward
    return float(symbolic.equal(_answer(response), _truth(label)))


GRADER = Grader(
    grade,
    quick,
    gives="1 if the box after `</think>` or `###Response` equals the label, by value or by "
    "math-verify",
    needs_label=True,
    takes_box=True,
    marks=MARKS,
    needs_package="math_verify",
)


def _answer(response: str) -> Answer | None:
    for mark in MARKS:
        if mark in response:
            boxed = last_boxed(response.rsplit(mark, 1)[1])
            return None if boxed is None else Answer.read(boxed)
    return None


def _truth(label: str | None) -> Answer | None:
    if label is None:
        return None
    text = last_boxed(label) if "\\boxed" in label else label
    return None if text is None else Answer.read(text)


def _same(answer: Answer, truth: Answer) -> bool | None:
    verdict = same(answer, truth)
    if answer.text == truth.text or answer.percent or truth.percent:
        return verdict
    given, wanted = ratio(answer.text), ratio(truth.text)
    if given is not None and wanted is not None:
        return given == wanted
    return False if _is_integer(answer) != _is_integer(truth) else verdict


def _is_integer(answer: Answer) -> bool:
    value = written_out(answer.text)
    return value is not None and value.denominator == 1
