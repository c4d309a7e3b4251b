"""Lists of numbers that are arrays until somebody reads them.

A Python list takes 8 bytes for an entry and 24 to 28 more for its number. A rollout of 100,000
samples of 8,192 tokens would have 50 GB of lists. `NumberList` fields therefore may hold `Numbers`
or `Runs`, which take 4 bytes for an entry or less. Whoever reads such a field gets an ordinary
list, which then stays in the field, so that a change of it counts. vime's own code uses the
functions below, which read and extend a field without making the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Numbers:
    """An entry for each value: int32 or float32. Nobody may write to `values`."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def array(self) -> np.ndarray:
        return self.values

    def tolist(self) -> list:
        return self.values.tolist()

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(np.concatenate([self.values, other.values]))


@dataclass(frozen=True, slots=True)
class Runs:
    """Whole numbers that come in runs: `values[i]`, `counts[i]` times."""

    values: tuple[int, ...]
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.counts)

    def array(self) -> np.ndarray:
        return np.repeat(np.asarray(self.values, np.int64), self.counts)

    def tolist(self) -> list[int]:
        return [v for v, n in zip(self.values, self.counts, strict=True) for _ in range(n)]

    def __add__(self, other: Runs) -> Runs:
        return Runs(self.values + other.values, self.counts + other.counts)


class NumberList:
    """A field of a class with slots, for `Numbers`, `Runs` or anything else.

    Reading it gives a list in place of `Numbers` and `Runs`. Other values stay as they are.
    """

    def __init__(self, slot: Any) -> None:
        self.slot = slot

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        if owner is None:
            return self
        value = self.slot.__get__(owner, kind)
        if isinstance(value, Numbers | Runs):
            value = value.tolist()
            self.slot.__set__(owner, value)
        return value

    def __set__(self, owner: Any, value: Any) -> None:
        self.slot.__set__(owner, value)

    def __delete__(self, owner: Any) -> None:
        self.slot.__delete__(owner)


def number_lists(*names: str) -> Any:
    """A class decorator: these slots become `NumberList` fields."""

    def change(kind: type) -> type:
        for name in names:
            setattr(kind, name, NumberList(kind.__dict__[name]))
        return kind

    return change


def stored(owner: Any, name: str) -> Any:
    """A field's value as it is stored: `Numbers`, `Runs`, a list, or anything else."""
    kind = getattr(type(owner), name, None)
    if isinstance(kind, NumberList):
        return kind.slot.__get__(owner, type(owner))
    return getattr(owner, name)


def listed(owner: Any, name: str) -> Any:
    """A field's value with a new list in place of `Numbers` and `Runs`; the field stays."""
    value = stored(owner, name)
    return value.tolist() if isinstance(value, Numbers | Runs) else value


def distinct(owner: Any, name: str) -> set[Any]:
    """The different entries of a field, without a list of all."""
    value = stored(owner, name)
    return set(value.values if isinstance(value, Runs) else value)


def array_of(owner: Any, name: str) -> Any:
    """A field's value with an array in place of `Numbers` and `Runs`. Nobody may write to it."""
    value = stored(owner, name)
    return value.array() if isinstance(value, Numbers | Runs) else value


def extend(owner: Any, name: str, more: Numbers | Runs | list[Any]) -> None:
    """Appends to a field, which gets a new value. None counts as empty.

    The result is `Numbers` or `Runs` if `more` is, and if these can hold the earlier entries
    exactly. Otherwise it is a list.
    """
    before: Any = stored(owner, name)
    if isinstance(more, Numbers | Runs):
        if before is None or before == []:
            setattr(owner, name, more)
            return
        if isinstance(before, list):
            same = _same_kind(before, more)
            before = before if same is None else same
    added: Any = more
    if type(before) is not type(more):
        before, added = (v.tolist() if isinstance(v, Numbers | Runs) else v for v in (before, more))
    setattr(owner, name, added if before is None else before + added)


def _same_kind(values: list, more: Numbers | Runs) -> Numbers | None:
    """The values as `Numbers` like `more`; None if they would not stay the same."""
    if isinstance(more, Runs):
        return None
    wanted = int if more.values.dtype.kind == "i" else float
    if {*map(type, values)} - {wanted}:
        return None
    try:
        array = np.asarray(values, more.values.dtype)
    except OverflowError:
        return None
    if wanted is float and not np.array_equal(array, values, equal_nan=True):
        return None
    return Numbers(array)
