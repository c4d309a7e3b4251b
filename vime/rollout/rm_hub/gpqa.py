"""`--rm-type gpqa`: 1 for the right letter of a multiple-choice question, else 0.

The right letter is `metadata["correct_letter"]`, or the label if it is a letter. Any other label is
the text of a choice in `metadata["choices"]` (a list, or {letter: text}).
"""

from __future__ import annotations

import re
import string
from typing import Any

from vime.rollout.rm_hub.grader import Grader

_STATED = (
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Z])\)?\s*\}?\s*\}"),
    re.compile(r"answer\s*(?:is|:)?\s*\**\s*\(?([A-Za-z])\b\)?", re.IGNORECASE),
    re.compile(r"(?:option|choice)\s*\(?([A-Za-z])\b\)?", re.IGNORECASE),
)
_ALONE = re.compile(r"(?:^|[\s(*])([A-Z])(?=[\s).,:*]|$)")


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> float:
    choices = _choices(metadata.get("choices"))
    wanted = metadata.get("correct_letter") or _letter_of(label, choices)
    if not wanted:
        return 0.0
    letters = set(choices) or set(string.ascii_uppercase[:10])
    return float(_given(response.rsplit("</think>", 1)[-1], letters) == wanted.strip().upper())


GRADER = Grader(
    grade,
    grade,
    gives='1 for the right letter (`metadata["correct_letter"]`, or the label)',
)


def _choices(choices: Any) -> dict[str, str]:
    if isinstance(choices, dict):
        return {str(letter).upper(): str(text) for letter, text in choices.items()}
    return {string.ascii_uppercase[i]: str(text) for i, text in enumerate(choices or ())}


def _letter_of(label: str | None, choices: dict[str, str]) -> str | None:
    text = (label or "").strip()
    if len(text) == 1 and text.isalpha():
        return text.upper()
    matches = [letter for letter, choice in choices.items() if choice.strip() == text]
    return matches[0] if matches else None


def _given(answer: str, letters: set[str]) -> str | None:
    for pattern in (*_STATED, _ALONE):
        found = [letter.upper() for letter in pattern.findall(answer)]
        found = [letter for letter in found if letter in letters]
        if found:
            return found[-1]
    return None
