"""How a dataclass field names its flag. One declaration serves parser, errors and docs."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any, Self

from vime.config.spelling import as_key
from vime.errors import ConfigError
from vime.plugins.hook import Hook, Plugin

Path = str  # as given on the command line


@dataclass(frozen=True, slots=True)
class Flag:
    """A field's command-line spelling.

    name     "--rollout-batch-size"
    help     one sentence for --help
    choices  allowed values, or ()
    nargs    argparse's, for lists
    repeats  a list flag given several times adds up; otherwise the last one wins
    negated  the flag that sets the field to False ("--no-offload-train"); the flag itself sets True
    type     a parser for one value where the annotation alone does not say (JSON, "1e-6", ...)
    at_least, above, at_most  bounds of a number; above is exclusive
    inherits     the flag whose value holds where this one is unset
    per_dataset  a data set of --eval-config may set it
    hook     how vime calls the function whose dotted path is the value
    hook_if  {field: another hook}, which applies while that field of the section is true
    """

    name: str
    help: str = ""
    choices: tuple[Any, ...] = ()
    nargs: str | None = None
    repeats: bool = False
    negated: str | None = None
    type: Any = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    inherits: str | None = None
    per_dataset: bool = False
    hook: Hook | None = None
    hook_if: dict[str, Hook] | None = None

    @property
    def dest(self) -> str:
        """The name that plugins read on `args`."""
        return as_key(self.name)

    @property
    def dataset_key(self) -> str:
        """The name in --eval-config: that of --rollout-X and of --eval-X is X."""
        return self.dest.removeprefix("eval_").removeprefix("rollout_")

    def problem(self, value: Any) -> str | None:
        """What is wrong with this value by itself: flag, value, remedy. None if nothing is."""
        if value is None:
            return None
        if self.choices and value not in self.choices:
            return f"{self.name} {value} is not known. Choose from {', '.join(self.choices)}."
        if self.at_least is not None and value < self.at_least:
            return f"{self.name} {value} is too small. Give {self.at_least} or more."
        if self.above is not None and value <= self.above:
            return f"{self.name} {value} is too small. Give more than {self.above}."
        if self.at_most is not None and value > self.at_most:
            return f"{self.name} {value} is too large. Give {self.at_most} or less."
        return None


def flag(name: str, help: str = "", *, default: Any = MISSING, **kw: Any) -> Any:
    """A dataclass field that a flag fills. Without a default the flag is required."""
    metadata = {"flag": Flag(name, help, **kw)}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_of(f: Field) -> Flag | None:
    return f.metadata.get("flag")


def default_of(f: Field) -> Any:
    """The value of a field that nothing sets; MISSING where it must be set."""
    return f.default if f.default_factory is MISSING else f.default_factory()


@cache
def flags_in(section: type) -> dict[str, Flag]:
    """{field name: Flag} of a section, in the order of its declaration."""
    return {f.name: spec for f in fields(section) if (spec := flag_of(f))}


class Section:
    """A part of the configuration that refuses values which cannot work."""

    __slots__ = ()

    def changed(self, **values: Any) -> Self:
        """A copy with other values, which nobody has checked."""
        other = copy(self)
        for name, value in values.items():
            object.__setattr__(other, name, value)
        return other

    def __post_init__(self) -> None:
        own = (spec.problem(getattr(self, name)) for name, spec in flags_in(type(self)).items())
        if problems := [*filter(None, own), *self.problems()]:
            raise ConfigError(*problems)

    def plugin(self, name: str) -> Plugin | None:
        """The user's function that the field `name` holds the path of; None where it is unset."""
        return next(iter(self.plugins(name)), None)

    def plugins(self, name: str) -> list[Plugin]:
        """The same for a field that may hold several paths."""
        spec, value = flags_in(type(self))[name], getattr(self, name)
        assert spec.hook is not None, name
        asked = [hook for other, hook in (spec.hook_if or {}).items() if getattr(self, other)]
        paths = value if isinstance(value, list) else [value] if value else []
        return [Plugin(spec.name, path, asked[0] if asked else spec.hook) for path in paths]

    def own_plugins(self) -> list[Plugin]:
        """Every function that this section names and that is not vime's default."""
        return [
            plugin
            for f in fields(self)
            if (spec := flag_of(f)) and spec.hook and getattr(self, f.name) != default_of(f)
            for plugin in self.plugins(f.name)
        ]

    def problems(self) -> Iterator[str]:
        """Values of this section that do not fit each other."""
        return iter(())
