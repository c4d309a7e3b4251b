"""Spellings of a flag: `--a-b` on the command line, `a_b` in Python and YAML. Finds near names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def as_key(flag: str) -> str:
    """ "--rollout-batch-size" -> "rollout_batch_size"."""
    return flag.lstrip("-").replace("-", "_")


def as_flag(key: str, prefix: str = "--") -> str:
    """ "rollout_batch_size" -> "--rollout-batch-size"."""
    return prefix + key.replace("_", "-")


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name with the most similar spelling, leading dashes ignored; None if none is near.

    cutoff  the minimum similarity, from 0 to 1
    """
    bare = {each.lstrip("-"): each for each in known}
    close = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=cutoff)
    return bare[close[0]] if close else None


def did_you_mean(
    name: str,
    known: Iterable[str],
    *,
    shown: Callable[[str], str] = str,
    otherwise: str = "",
) -> str:
    """A hint for the end of an error message.

    shown      writes the known name as the user should
    otherwise  the hint if no name is near
    """
    close = nearest(name, known)
    return otherwise if close is None else f"Did you mean {shown(close)}?"
