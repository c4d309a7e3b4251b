"""Finds, normalises and compares final answers as text, without algebra."""

from __future__ import annotations

import re
from fractions import Fraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DECIMAL = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
_FRACTION = re.compile(r"([+-]?)\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}|([+-]?\d+)/(\d+)")
_LONGEST_NUMBER = 64

_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|!|,|;|:|\s)(?![a-zA-Z])|\^\{?\\circ\}?|\\\$|\$|\\?%|\\ "
)
_UNIT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\{\s[^{}]*\}$")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}")
_SHORT_FRAC = re.compile(r"\\frac(\d)(\d)")
_HALF_SHORT_FRAC = re.compile(r"\\frac(?:(\d)\{([^{}]*)\}|\{([^{}]*)\}(\d))")
_BARE_SQRT = re.compile(r"\\sqrt\s*(\w)")
_NAMED = re.compile(r"^[a-zA-Z](?:\([a-zA-Z]\))?=")
_BARE_POINT = re.compile(r"(?<!\d)\.(?=\d)")
_INT_RATIO = re.compile(r"^([+-]?)(\d+)/(\d+)$")


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
    """The answer in one spelling: without spaces and units, short fractions written out."""
    text = answer.strip().rstrip(".").replace("\n", "")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = _DROPPED.sub("", text)
    text = _UNIT.sub("", text)
    text = _TEXT.sub(r"\1", text)
    text = _BARE_POINT.sub("0.", text)
    text = _BARE_SQRT.sub(r"\\sqrt{\1}", text)
    text = text.replace(" ", "")
    text = _NAMED.sub("", text)
    text = _SHORT_FRAC.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_SHORT_FRAC.sub(
        lambda m: rf"\frac{{{m[1] or m[3]}}}{{{m[2] if m[1] else m[4]}}}", text
    )
    text = _INT_RATIO.sub(r"\1\\frac{\2}{\3}", text)
    return r"\frac{1}{2}" if text == "0.5" else text


def decimal(text: str) -> Fraction | None:
    """The value of a plain decimal such as `-1,234.5`; None for anything else."""
    if not text or len(text) > _LONGEST_NUMBER or not _DECIMAL.fullmatch(text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except ValueError:  # the text is only a sign
        return None


def ratio(text: str) -> Fraction | None:
    r"""The value of `3/4` or `\frac{3}{4}`; None for anything else."""
    found = _FRACTION.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if found is None:
        return None
    sign, top, bottom = found[1] or "", found[2] or found[4], found[3] or found[5]
    if int(bottom) == 0:
        return None
    value = Fraction(int(top), int(bottom))
    return -value if sign == "-" else value


def number(text: str) -> Fraction | None:
    """The value of a plain decimal or ratio; None for anything else."""
    value = decimal(text)
    return ratio(text) if value is None else value


def same_number(a: str, b: str) -> bool | None:
    """Whether two plain numbers are equal; None if one of the texts is not a plain number."""
    x, y = number(a), number(b)
    return None if x is None or y is None else x == y
