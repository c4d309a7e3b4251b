"""One change to torch or megatron-core: what it needs there, why it is made and until when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Patch:
    """symbols: dotted names that must exist for the patch to mean anything; a test checks them."""

    name: str
    why: str
    until: str
    symbols: tuple[str, ...]
    apply: Callable[[], None]


def resolve(symbol: str) -> Any:
    """The object behind "package.module.Class.attribute". Raises AttributeError or ImportError."""
    parts = symbol.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = __import__(".".join(parts[:cut]), fromlist=["_"])
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ImportError(symbol)
