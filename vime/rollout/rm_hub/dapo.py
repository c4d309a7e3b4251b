"""`--rm-type dapo`: the text after `Answer:` in the last 300 characters against the label.

Gives {score: 1 or -1, acc, pred}; train with `--reward-key score`. DAPO (arXiv:2503.14476) compares
answers like Minerva.
"""

from __future__ import annotations

import re
from typing import Any

from vime.rollout.rm_hub.answers import last_boxed, normalise
from vime.rollout.rm_hub.grader import Grader
from vime.rollout.rm_hub.numerals import decimal

_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_FORMULA = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)+)\$")
_TAIL = 300
NO_ANSWER = "[INVALID]"


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> dict[str, Any]:
    found = _ANSWER.findall(response[-_TAIL:])
    pred = _clean(found[-1]) if found else NO_ANSWER
    correct = bool(found) and label is not None and _equal(pred, _clean(label))
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred}


GRADER = Grader(
    grade,
    grade,
    gives="`{score: 1 or -1, acc, pred}` of the last `Answer:` line; needs `--reward-key score`",
    lowest_reward={"score": -1.0, "acc": 0.0},
    needs_label=True,
    takes_box=True,
)


def _equal(pred: str, truth: str) -> bool:
    value = decimal(pred)
    return pred == truth or (value is not None and value == decimal(truth))


def _clean(answer: str) -> str:
    text = re.sub(r"<\|[^|>]*\|>", "", answer).strip().strip("*").strip()
    boxed = last_boxed(text)
    if boxed is not None:
        text = boxed
    elif (formula := _FORMULA.search(text)) is not None:
        text = formula[1]
    if "=" in text:
        text = text.rsplit("=", 1)[1]
    text = normalise(text)
    return text.replace(",", "") if decimal(text) is not None else text
