"""Equality of expressions by math-verify. It may hang or eat memory: call it in a worker process.

math-verify compares floats to six places, takes any brackets for a set, and has no bases; the
checks around it refuse equalities of these kinds.
"""

from __future__ import annotations

import re
from typing import Any

from vime.rollout.rm_hub.answers import Answer

TOLERANCE = 1e-6  # relative

_BASED = re.compile(r"([0-9a-zA-Z]+)_\{?(\d{1,2})\}?")
_FULL = (("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), (r"\{", r"\}"))


def equal(answer: Answer, label: Answer) -> bool:
    """Whether two answers are equal in mathematics. Unreadable answers are not."""
    if _is_set(answer.formula) is (not _is_set(label.formula)) and _both_bracketed(answer, label):
        return False
    based = _BASED.fullmatch(answer.text), _BASED.fullmatch(label.text)
    if all(based):
        return based[0][2] == based[1][2] and based[0][1].lower() == based[1][1].lower()
    from math_verify import parse, verify

    # The worker process has a deadline already, and math-verify's alarms would disturb it.
    wanted = parse(f"${label.formula}$", parsing_timeout=None)
    given = parse(f"${answer.formula}$", parsing_timeout=None)
    wanted, given = _with_one_i(wanted, given)
    if not verify(wanted, given, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    return _close(wanted, given)


def _both_bracketed(answer: Answer, label: Answer) -> bool:
    return _bracketed(answer.formula) and _bracketed(label.formula)


def _bracketed(text: str) -> bool:
    return "," in text and any(text.startswith(a) and text.endswith(b) for a, b in _FULL)


def _is_set(text: str) -> bool:
    return text.startswith(r"\{")


def _with_one_i(*parsed: list[Any]) -> list[list[Any]]:
    r"""math-verify reads `i` as the imaginary unit in some places, and as a variable in others."""
    from sympy import Expr, I

    return [
        [
            term.subs({symbol: I for symbol in term.free_symbols if symbol.name == "i"})
            if isinstance(term, Expr)
            else term
            for term in found
        ]
        for found in parsed
    ]


def _close(wanted: list[Any], given: list[Any]) -> bool:
    """False if both are numbers that differ in proportion, which rounding to places hides."""
    from sympy import Expr, N

    pair = [next((t for t in found if isinstance(t, Expr)), None) for found in (wanted, given)]
    if any(term is None or not term.is_number for term in pair):
        return True
    a, b = (N(term, 30) for term in pair)
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return True
    return bool(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)))
