"""`--rm-type gpqa`: 1 for the right letter of a multiple-choice question, else 0.

The right letter is `metadata["correct_letter"]`, or the label if it is a letter. Any other label is
the text of a choice in `metadata["choices"]` (a list, or {letter: text}).

The given letter is the last one in a box, else after "answer is", else after "option" or "choice",
else the last capital that stands alone.
"""

from __future__ import annotations

import re
import string
from typing import Any

from vime.rollout.rm_hub.answers import last_boxed
from vime.rollout.rm_hub.grader import Grader, GradingFailed

# The patterns read text whose spaces are single and whose marks of style are gone, in linear time.
_STYLED = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|boldsymbol) ?\{ ?([^{} ]{1,8}) ?\}"
)
_STYLE = str.maketrans("", "", "*$`")
_LETTER = r"(?:\( ?([A-Za-z]) ?\)|([A-Z])(?![\w'’])|([a-z])(?=\s?[.,;:)]|\n|$))"
_STATED = tuple(
    re.compile(rf"(?i:\b{words})\s?(?i:option|choice)? ?{_LETTER}")
    for words in (r"answer(?: is)? ?:?", "(?:option|choice)")
)
_ALONE = re.compile(r"(?<![\w'’\\])([A-Z])(?![\w'’])(?! ?[=+])")
# "A" before a word is an article, unless the word is one of these; "I" before a word is a person.
_ARTICLE = re.compile(r"A (?!(?:is|was|because|since|as|and|or|would|must|seems)\b)[a-z]|I [a-z]")


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> float:
    if problem := row_problem(label, metadata):
        raise GradingFailed(problem)
    choices = _choices(metadata.get("choices"))
    wanted = _wanted(label, metadata, choices)
    letters = set(choices) or {*string.ascii_uppercase[:10], wanted}
    return float(_given(response.rsplit("</think>", 1)[-1], letters) == wanted)


def row_problem(label: str | None, metadata: dict[str, Any]) -> str | None:
    """Why no letter is right for such a row; None if one is."""
    letter, choices = metadata.get("correct_letter"), metadata.get("choices")
    if choices is not None and not isinstance(choices, (list, tuple, dict)):
        return f'metadata["choices"] must be a list or {{letter: text}}, not {choices!r:.80}'
    if letter is not None and not (isinstance(letter, str) and _as_letter(letter)):
        return f'metadata["correct_letter"] must be a letter, not {letter!r:.80}'
    wanted = _wanted(label, metadata, _choices(choices))
    if wanted and choices and wanted not in _choices(choices):
        return f"the right letter {wanted} is not among the {len(choices)} choices of the metadata"
    if wanted is None:
        return (
            f"the label {label!r:.80} is neither a letter nor the text of a choice in "
            'metadata["choices"], and there is no metadata["correct_letter"]'
        )
    return None


GRADER = Grader(
    grade,
    grade,
    gives='1 for the right letter (`metadata["correct_letter"]`, or the label)',
    row_problem=row_problem,
)


def _choices(choices: Any) -> dict[str, str]:
    if isinstance(choices, dict):
        return {str(letter).upper(): str(text) for letter, text in choices.items()}
    return dict(zip(string.ascii_uppercase, map(str, choices or ()), strict=False))


def _wanted(label: str | None, metadata: dict[str, Any], choices: dict[str, str]) -> str | None:
    if letter := metadata.get("correct_letter"):
        return _as_letter(letter)
    text = (label or "").strip()
    if letter := _as_letter(text):
        return letter
    return next((letter for letter, choice in choices.items() if choice.strip() == text), None)


def _as_letter(text: str) -> str | None:
    letter = text.strip().strip("()").upper()
    return letter if len(letter) == 1 and letter in string.ascii_uppercase else None


def _given(answer: str, letters: set[str]) -> str | None:
    boxed = last_boxed(answer)
    if boxed is not None and (letter := _as_letter(_plain(boxed).rstrip("."))) in letters:
        return letter
    text = _plain(answer)
    for pattern in _STATED:
        found = [next(filter(None, groups)).upper() for groups in pattern.findall(text)]
        if stated := [letter for letter in found if letter in letters]:
            return stated[-1]
    for found in reversed(list(_ALONE.finditer(text))):
        if found[1] in letters and not _ARTICLE.match(text, found.start()):
            return found[1]
    return None


def _plain(text: str) -> str:
    """The text without marks of style and formulas, empty lines and repeated spaces."""
    text = text.replace(r"\(", "(").replace(r"\)", ")").translate(_STYLE)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return _STYLED.sub(r"\1", "\n".join(filter(None, lines)))
