"""The table of all flags: flags of the configuration's fields, and other flags of Megatron."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from vime.cli.megatron_flags import BF16, IDLE, MODEL_FLAGS, STATED, SWITCH
from vime.config import Config
from vime.config.fields import Flag, flags_in
from vime.config.spelling import as_key

MODEL_ARGS = "MODEL_ARGS"
STATED_FLAGS = "stated"


@dataclass(frozen=True, slots=True)
class Entry:
    """A flag and the field that it fills.

    owner   a section of `Config` ("batch"), MODEL_ARGS or STATED_FLAGS
    field   a field of that section, or a key of `cfg.model.args`
    parse   text -> value; SWITCH for a flag without a value
    nargs   "+" for a list
    switch_value  the value that a switch sets
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
    """{"batch": BatchConfig, ...}."""
    hints = typing.get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config)}


@cache
def all_flags() -> dict[str, Entry]:
    """{"--lr": its Entry, ...}."""
    entries = [
        entry
        for owner, section in section_types().items()
        for name, spec in flags_in(section).items()
        for entry in _entries(owner, name, spec, typing.get_type_hints(section)[name])
    ]
    entries += [Entry(n, MODEL_ARGS, as_key(n), parse) for n, parse in MODEL_FLAGS.items()]
    entries += [Entry(n, STATED_FLAGS, n, str if s.values else SWITCH) for n, s in STATED.items()]
    entries += [
        Entry(n, STATED_FLAGS, n, str if i.takes_value else SWITCH) for n, i in IDLE.items()
    ]
    entries.append(Entry(BF16, STATED_FLAGS, BF16, SWITCH))
    return {entry.name: entry for entry in entries}


def _entries(owner: str, field: str, spec: Flag, hint: Any) -> list[Entry]:
    parse = spec.type or _parser_of(hint)
    entries = [Entry(spec.name, owner, field, parse, spec.nargs, True, spec)]
    if spec.also:
        other = replace(spec, name=spec.also, also=None)
        entries.append(Entry(spec.also, owner, field, parse, spec.nargs, True, other))
    if spec.negated:
        entries.append(Entry(spec.negated, owner, field, SWITCH, None, False, spec))
    return entries


def _parser_of(hint: Any) -> Callable[[str], Any]:
    """The parser of a type: `int | None` -> int. The items of a list are strings."""
    if isinstance(hint, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    return hint if hint in (bool, int, float) else str
