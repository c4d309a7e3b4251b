"""Equality of expressions by sympy. It may hang or eat memory: call it in a worker process."""

from __future__ import annotations

import re

from vime.rollout.rm_hub.answers import number

_LATEX = (
    (re.compile(r"\\(?:cdot|times)"), "*"),
    (re.compile(r"\\div"), "/"),
    (re.compile(r"\\(?:pi)(?![a-zA-Z])"), "(pi)"),
    (re.compile(r"\\(?:infty)(?![a-zA-Z])"), "(oo)"),
    (re.compile(r"\\(sin|cos|tan|log|ln|exp)(?![a-zA-Z])"), r"\1"),
)
_FRAC = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_SQRT = re.compile(r"\\sqrt\{([^{}]*)\}")
_ROOT = re.compile(r"\\sqrt\[(\d+)\]\{([^{}]*)\}")
_POWER = re.compile(r"\^\{([^{}]*)\}")
_WORDS = {"sqrt", "pi", "oo", "sin", "cos", "tan", "log", "ln", "exp"}
# Only these characters reach sympy's parser, which evaluates its input. There are no quotes and no
# underscores, and points occur only inside numbers, so that an answer cannot name an attribute.
_SAFE = re.compile(r"(?:[a-zA-Z+\-*/^()!= ]|\d+(?:\.\d+)?)*")


def equal(a: str, b: str) -> bool:
    """Whether two normalised answers are mathematically equal. Unreadable answers never are."""
    parts_a, parts_b = _split(a), _split(b)
    if len(parts_a) != len(parts_b) or _brackets(a) != _brackets(b):
        return False
    return all(_same(x, y) for x, y in zip(parts_a, parts_b, strict=True))


def _same(a: str, b: str) -> bool:
    if a == b:
        return True
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x == y
    left, right = _parse(a), _parse(b)
    if left is None or right is None:
        return False
    import sympy

    try:
        difference = sympy.simplify(left - right)
        return bool(difference == 0 or difference.equals(0))
    except (TypeError, ValueError, AttributeError, RecursionError, ArithmeticError):
        return False


def _parse(text: str):
    from sympy.parsing.sympy_parser import (
        convert_xor,
        implicit_multiplication_application,
        parse_expr,
        split_symbols,
        standard_transformations,
    )

    plain = _to_plain(text)
    if not _SAFE.fullmatch(plain):
        return None
    words = re.findall(r"[a-zA-Z]+", plain)
    if any(word not in _WORDS and len(word) > 1 for word in words):
        return None
    rules = (*standard_transformations, split_symbols, implicit_multiplication_application)
    try:
        return parse_expr(plain, transformations=(*rules, convert_xor))
    except (SyntaxError, TypeError, ValueError, AttributeError, RecursionError, ArithmeticError):
        return None
    except Exception as error:  # sympy's tokenizer raises its own types of errors
        if isinstance(error, MemoryError):
            raise
        return None


def _to_plain(text: str) -> str:
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    before = None
    while before != text:
        before = text
        text = _FRAC.sub(r"((\1)/(\2))", text)
        text = _ROOT.sub(r"((\2)^(1/\1))", text)
        text = _SQRT.sub(r"sqrt(\1)", text)
        text = _POWER.sub(r"^(\1)", text)
    return text


def _brackets(text: str) -> str:
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and "," in text:
        return text[0] + text[-1]
    return ""


def _split(text: str) -> list[str]:
    """The members of a tuple or an interval. Any other text is its only member."""
    return text[1:-1].split(",") if _brackets(text) else [text]
