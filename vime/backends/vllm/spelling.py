"""How vLLM and its router write flags and numbers."""

from __future__ import annotations

from typing import Any

from vime.config.spelling import as_flag

SCALE = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def words_of(name: str, value: Any) -> list[str]:
    """("max_num_seqs", "8") -> ["--max-num-seqs", "8"]. True gives a bare flag, False gives []."""
    flag = as_flag(name)
    if value is True or value is False:
        return [flag] if value else []
    return [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]


def whole_number(value: Any) -> int | None:
    """ "8192", "8k" (thousands), "8K" (1024s) -> a number; None if `value` is none of these."""
    text = str(value)
    try:
        if text[-1:] in SCALE:
            return int(float(text[:-1]) * SCALE[text[-1]])
        return int(text)
    except ValueError:
        return None
