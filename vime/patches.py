"""A change that vime makes to another library at run time: why, until when, and to which symbols.

`backends/megatron/compat` lists the patches of torch and megatron-core, and
`backends/vllm/plugin_patches.py` those of vLLM. A test checks that every symbol still exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Patch:
    """One change.

    name     unique among all patches
    why      the fault of the library, or the reason why vime needs another behaviour
    until    the condition under which the patch can be deleted
    symbols  dotted names that the patch replaces or needs
    apply    makes the change
    """

    name: str
    why: str
    until: str
    symbols: tuple[str, ...]
    apply: Callable[[], None]


_applied: set[str] = set()


def apply_once(patches: Iterable[Patch]) -> None:
    """Apply the patches that this process, or the process that forked it, has not applied yet."""
    for patch in patches:
        if patch.name not in _applied:
            patch.apply()
            _applied.add(patch.name)


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
