"""Every flag there is, in one table: the fields of the configuration plus Megatron's own."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from vime.cli.megatron_flags import BF16, MODEL_FLAGS, STATED, SWITCH
from vime.config import Config
from vime.config.fields import Flag, flags_in
from vime.config.spelling import as_key

MODEL_ARGS = "MODEL_ARGS"
STATED_FLAGS = "stated"


@dataclass(frozen=True, slots=True)
class Entry:
    """One spelling on the command line and the field that it fills.

    owner   section of `Config` ("batch"), or MODEL_ARGS, or STATED_FLAGS
    field   the field of that section, or the key in `cfg.model.args`
    parse   text -> value; `bool` marks a switch
    nargs   "+" for a list, else None
    switch_value  what a switch sets
    """

    name: str
    owner: str
    field: str
    parse: Callable[[str], Any]
    nargs: str | None = None
    switch_value: bool = True
    spec: Flag | None = None

    @property
    def is_switch(self) -> bool:
        return self.parse is SWITCH


def section_types() -> dict[str, type]:
    """{"batch": BatchConfig, ...} in the order of `Config`."""
    hints = typing.get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config)}


@cache
def all_flags() -> dict[str, Entry]:
    """{"--lr": Entry, ...}: sections first, then MODEL_ARGS, then the stated flags."""
    entries = [
        entry
        for owner, section in section_types().items()
        for name, spec in flags_in(section).items()
        for entry in _entries(owner, name, spec, typing.get_type_hints(section)[name])
    ]
    entries += [Entry(n, MODEL_ARGS, as_key(n), parse) for n, parse in MODEL_FLAGS.items()]
    entries += [Entry(n, STATED_FLAGS, n, str if s.values else SWITCH) for n, s in STATED.items()]
    entries.append(Entry(BF16, STATED_FLAGS, BF16, SWITCH))
    return {entry.name: entry for entry in entries}


def _entries(owner: str, field: str, spec: Flag, hint: Any) -> list[Entry]:
    parse = spec.type or _parser_of(hint)
    entries = [Entry(spec.name, owner, field, parse, spec.nargs, True, spec)]
    if spec.negated:
        entries.append(Entry(spec.negated, owner, field, SWITCH, None, False, spec))
    return entries


def _parser_of(hint: Any) -> Callable[[str], Any]:
    """`int | None` -> int; a list without a parser of its own holds strings."""
    if isinstance(hint, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    return hint if hint in (bool, int, float) else str
