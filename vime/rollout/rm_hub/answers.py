"""Final answers as text: find, normalise and compare them, as far as that needs no algebra."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from vime.rollout.rm_hub.numerals import number
from vime.rollout.rm_hub.units import split_unit, units_differ

LONGEST_ANSWER = 5000  # characters; a longer text reads as an empty answer, which equals none

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FORMULA = re.compile(r"\$(.+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)

_SIGNS = str.maketrans({"−": "-", "–": "-", "°": r"^\circ", "\n": " "})
_SPACE = re.compile(r"(?:(?<!\\)\\[,;: ]|\\quad(?![a-zA-Z])|[~\s])+")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])\s?|\\!|\\\$|\$|\\?%")
_DEGREES = re.compile(r"\^ ?(?:\{ ?\\circ ?\}|\\circ)(?![a-zA-Z])")
_PERCENT = re.compile(r"\\?%|(?<![a-zA-Z])percent(?![a-zA-Z])")
_PERCENT_WORD = re.compile(r"\\text\{ ?percent ?\}|(?<![a-zA-Z])percent(?![a-zA-Z])")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|mathbf|textbf|textrm)\{([^{}]*)\}")
_CONNECTIVE = re.compile(
    r",? ?(?:\\(?:text|mbox|mathrm)\{ ?(?:and|or) ?\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])) ?"
)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)(?! \d)")
_MIXED = re.compile(r"(?<![\d.,/])(\d+) (?:(\d+)/(\d+)(?!\d)|(?=\\frac))")
_SHORT_FRAC = re.compile(r"\\frac ?(\d) ?(\d)")
_HALF_SHORT_FRAC = re.compile(r"\\frac ?(?:(\d) ?\{([^{}]*)\}|\{([^{}]*)\} ?(\d))")
_BARE_SQRT = re.compile(r"\\sqrt ?(\w)")
_BARE_POINT = re.compile(r"(?<!\d)\.(?=\d)")
_IDLE_SPACE = re.compile(r"(\d) (?=\d)|(\\[a-zA-Z]+) (?=[a-zA-Z])| ")
_GAP = re.compile(r"(?<![_\d])\d+ \d")
_INT_RATIO = re.compile(r"^([+-]?)(\d+)/(\d+)$")
_NAMED = re.compile(r"(?:^|(?<=,))[a-zA-Z](?:\([a-zA-Z]\))?=")
_SPELT = (
    ("tfrac", "frac"), ("dfrac", "frac"), ("cfrac", "frac"), ("{,}", ","), (r",\!", ","),
    (r"\varnothing", r"\emptyset"), (r"\log_e", r"\ln"),
)  # fmt: skip


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`; None without a box, or if its braces do not close."""
    start = None
    for found in _BOX.finditer(text):
        start = found.end()
    if start is None:
        return None
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()].strip()
    return None


def normalise(answer: str) -> str:
    """One spelling for answers that can be written in several: spaces, units, short fractions."""
    return Answer.read(answer).text


@dataclass(frozen=True, slots=True)
class Answer:
    """A final answer in one spelling.

    formula  the answer without units, spaces that mean nothing, and short fractions
    text     the same without the name in front (`x=7` -> `7`)
    unit     the unit behind it
    percent  whether it had a percent sign, which `formula` and `text` lack
    """

    formula: str
    text: str
    unit: str | None
    percent: bool

    @classmethod
    def read(cls, answer: str) -> Answer:
        if len(answer) > LONGEST_ANSWER:
            return cls("", "", None, False)
        text = _outside(answer)
        for spelling, plain in _SPELT:
            text = text.replace(spelling, plain)
        text = _SPACE.sub(" ", text)
        percent = _PERCENT.search(text) is not None
        text = _PERCENT_WORD.sub("", _DEGREES.sub("", text))
        text = _DROPPED.sub("", text).strip()
        text, unit = split_unit(text)
        text = _CONNECTIVE.sub(",", text)
        text = _TEXT.sub(r"\1", text).strip()
        text = _BARE_POINT.sub("0.", text)
        text = _BARE_SQRT.sub(r"\\sqrt{\1}", text)
        text = _SHORT_FRAC.sub(r"\\frac{\1}{\2}", text)
        text = _HALF_SHORT_FRAC.sub(
            lambda m: rf"\frac{{{m[1] or m[3]}}}{{{m[2] if m[1] else m[4]}}}", text
        )
        text = _GROUPED.sub(lambda m: m[0].replace(" ", ""), text)
        text = _MIXED.sub(lambda m: m[1] + (rf"\frac{{{m[2]}}}{{{m[3]}}}" if m[2] else ""), text)
        formula = _IDLE_SPACE.sub(lambda m: f"{m[1] or m[2]} " if m[1] or m[2] else "", text)
        text = _INT_RATIO.sub(r"\1\\frac{\2}{\3}", _NAMED.sub("", formula))
        return cls(formula, r"\frac{1}{2}" if text == "0.5" else text, unit, percent)

    @property
    def has_gap(self) -> bool:
        """Whether digits stand side by side with a space between, as in `3 4`: no number."""
        return _GAP.search(self.text) is not None

    @property
    def is_words(self) -> bool:
        return len(self.text) > 1 and self.text.isalpha()


def same(answer: Answer, label: Answer) -> bool | None:
    """Whether two answers are equal; None if only algebra can tell."""
    if not answer.text or not label.text or units_differ(answer.unit, label.unit):
        return False
    x, y = number(answer.text), number(label.text)
    if x is not None and y is not None:
        return same_value(x, y, answer, label)
    if answer.text == label.text:
        return True
    if answer.is_words and label.is_words and answer.text.lower() == label.text.lower():
        return True
    return False if answer.has_gap or label.has_gap else None


def same_value(x: Fraction, y: Fraction, answer: Answer, label: Answer) -> bool:
    """Whether the values x of the answer and y of the label are equal, where % may be left out.

    A label below 1 without a percent sign is a share, so the answer 25% equals it only as 0.25.
    """
    if answer.percent and not label.percent:
        return x / 100 == y or (x == y and abs(y) >= 1)
    return x == y or (label.percent and not answer.percent and x == y / 100)


def _outside(answer: str) -> str:
    """The answer without the marks of a formula, outer braces and a full stop around it."""
    text = answer.translate(_SIGNS).strip()
    text = text[:-1].rstrip() if text.endswith(".") else text
    for _ in range(2):
        if found := _FORMULA.fullmatch(text):
            inner = next(part for part in found.groups() if part is not None)
            text = inner.strip() if "$" not in inner.replace(r"\$", "") else text
        elif text.startswith("{") and text.find("}") == len(text) - 1:
            text = text[1:-1].strip()
    return text
