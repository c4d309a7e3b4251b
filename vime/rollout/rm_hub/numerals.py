r"""Plain numbers in normalised answers, as exact fractions: no step goes through a float.

A plain number is a decimal (`-1,234.5`, `0.\overline{3}`), a number in scientific notation
(`6.63e-34`, `3\times10^8`), a ratio (`-3/4`, `\frac{-3}{4}`) or a mixed number (`2\frac{1}{2}`).
"""

from __future__ import annotations

import re
from fractions import Fraction

_LONGEST_NUMBER = 4096
_LARGEST_EXPONENT = 4096

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"[+-]?{_DIGITS}?(?:\.\d+)?")
_REPEATING = re.compile(rf"([+-]?)({_DIGITS}?\.)(\d*)\\overline\{{(\d+)\}}")
_SCIENTIFIC = re.compile(
    rf"([+-]?{_DIGITS}?(?:\.\d+)?)(?:[eE]([+-]?\d+)|(?:\\times|\\cdot|\*)10\^(?:\{{([+-]?\d+)\}}|(\d+)))"
)
_POWER_OF_TEN = re.compile(r"([+-]?)10\^(?:\{([+-]?\d+)\}|(\d))")
_RATIO = re.compile(r"([+-]?)\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}|([+-]?\d+)/(\d+)")
_MIXED = re.compile(r"([+-]?)(\d+)\\frac\{(\d+)\}\{(\d+)\}")


def decimal(text: str) -> Fraction | None:
    """The value of a decimal such as `-1,234.5`; None for anything else."""
    if not _is_short(text) or not _DECIMAL.fullmatch(text) or not text.strip("+-"):
        return None
    return _value(text)


def written_out(text: str) -> Fraction | None:
    """The value of a decimal or of a number in scientific notation; None for anything else."""
    value = decimal(text)
    if value is not None or not _is_short(text):
        return value
    if found := _REPEATING.fullmatch(text):
        sign, head, fixed, repeated = found.groups()
        period = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
        return _signed(sign, _value(f"{head}{fixed}0") + period)
    if found := _POWER_OF_TEN.fullmatch(text):
        return _scaled(_signed(found[1], Fraction(1)), found[2] or found[3])
    if (found := _SCIENTIFIC.fullmatch(text)) and found[1].strip("+-"):
        return _scaled(_value(found[1]), found[2] or found[3] or found[4])
    return None


def ratio(text: str) -> tuple[int, int] | None:
    r"""(numerator, denominator > 0) of `3/4` or `\frac{-3}{4}`, not reduced; otherwise None."""
    found = _RATIO.fullmatch(text) if _is_short(text) else None
    if found is None:
        return None
    top, bottom = int(found[2] or found[4]), int(found[3] or found[5])
    if bottom == 0:
        return None
    if (found[1] == "-") != (bottom < 0):
        top = -top
    return top, abs(bottom)


def number(text: str) -> Fraction | None:
    """The value of a plain number; None for anything else."""
    value = written_out(text)
    if value is not None:
        return value
    if (parts := ratio(text)) is not None:
        return Fraction(*parts)
    mixed = _MIXED.fullmatch(text) if _is_short(text) else None
    if mixed is None or int(mixed[4]) == 0:
        return None
    return _signed(mixed[1], int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4])))


def _is_short(text: str) -> bool:
    return 0 < len(text) <= _LONGEST_NUMBER


def _value(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _scaled(value: Fraction, exponent: str) -> Fraction | None:
    if len(exponent) > 6 or abs(int(exponent)) > _LARGEST_EXPONENT:
        return None
    return value * Fraction(10) ** int(exponent)
