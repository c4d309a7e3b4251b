r"""Units behind an answer: `5\text{ cm}`, `90^\circ`, `34 dollars`. A unit may be left out."""

from __future__ import annotations

import re

# Spellings of one unit stand in one row. Two known units that differ make two answers differ.
_UNITS = (
    "mm millimeter millimeters", "cm centimeter centimeters", "m meter meters metre metres",
    "km kilometer kilometers", "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles",
    "s sec second seconds", "min minute minutes", "h hr hour hours", "day days", "week weeks",
    "month months", "year years", "g gm gram grams", "kg kilogram kilograms", "lb lbs pound pounds",
    "cent cents", "dollar dollars", "degree degrees", "radian radians", "mph", "kmh", "unit units",
    "liter liters", "ml", "people", "person", "student students", "way ways", "point points",
    "integer integers", "digit digits", "edge edges", "square", "ticket tickets",
)  # fmt: skip
_CANONICAL = {word: row.split()[0] for row in _UNITS for word in row.split()}
_BARE = "|".join(sorted((w for w in _CANONICAL if len(w) > 1), key=len, reverse=True))

_IN_TEXT = re.compile(
    r"(?:(?<=[\d})\]])|(?=\\[a-z]+\{[ ~]))[ ]?"
    r"\\(?:text|mbox|mathrm|textrm|textbf)\{(?![ie]\})([^{}]*)\}(?:\^\{?\d\}?)?$"
)
_BEHIND_NUMBER = re.compile(rf"(?<=[\d}})])[ ]?({_BARE})(?: (?:{_BARE}))?(?:\^\{{?\d\}}?)?$")


def split_unit(text: str) -> tuple[str, str | None]:
    """(the answer without its unit, the unit if there is one). Spaces are single by now."""
    for pattern in (_IN_TEXT, _BEHIND_NUMBER):
        if (found := pattern.search(text)) and found.start() > 0:
            return text[: found.start()].rstrip(), found[1].strip(" ~")
    return text, None


def units_differ(a: str | None, b: str | None) -> bool:
    """Whether both units are known, and differ."""
    x, y = _CANONICAL.get(a or ""), _CANONICAL.get(b or "")
    return x is not None and y is not None and x != y
