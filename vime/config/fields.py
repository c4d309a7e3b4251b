"""How a field of a configuration declares its flag: for parser, help, errors and `args`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Self

from vime.config.spelling import as_key
from vime.errors import ConfigError
from vime.plugins.hook import Hook, Plugin

Path = str  # as given on the command line


@dataclass(frozen=True, slots=True)
class Flag:
    """A field's flag.

    name       "--rollout-batch-size"
    also       another spelling of the same flag
    help       one sentence for --help
    choices    the allowed values; empty: any
    nargs      "+" for a list
    repeats    the values of a repeated list flag are joined; otherwise the last flag wins
    negated    the flag that sets the field to False ("--no-offload-train"); `name` sets it to True
    type       the parser of one word, if the field's annotation does not determine it
    at_least, above, at_most  bounds of a number; `above` is exclusive
    only_with  flags of the same section that this flag needs to have an effect: "--opd-type vllm"
    inherits   the flag whose value is used if this one is unset
    per_dataset  whether a data set of --eval-config may set it
    fills      for a path template: values that {rollout_id} takes, for example (0, 1)
    hook       how vime calls the function whose dotted path is the value
    hook_if    {field: another hook}, which applies while that field of the section is true
    """

    name: str
    help: str = ""
    also: str | None = None
    choices: tuple[Any, ...] = ()
    nargs: str | None = None
    repeats: bool = False
    negated: str | None = None
    type: Any = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    only_with: str = ""
    inherits: str | None = None
    per_dataset: bool = False
    fills: tuple[Any, ...] = ()
    hook: Hook | None = None
    hook_if: dict[str, Hook] | None = None

    @property
    def dest(self) -> str:
        """The name that plugins read on `args`."""
        return as_key(self.name)

    @property
    def dataset_key(self) -> str:
        """The key in --eval-config: X for --rollout-X and for --eval-X."""
        return self.dest.removeprefix("eval_").removeprefix("rollout_")

    def problem(self, value: Any) -> str | None:
        """The problem of a value on its own, with flag and remedy; None if there is none."""
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
        return self._problem_of_template(value) if self.fills else None

    def _problem_of_template(self, value: str) -> str | None:
        try:
            paths = {value.format(rollout_id=fill) for fill in self.fills}
        except (KeyError, IndexError, ValueError, AttributeError, TypeError):
            return (
                f"{self.name} {value}: only {{rollout_id}} can stand in braces. Correct it, or "
                "write {{ and }} for braces that belong to the name."
            )
        if len(paths) < len(self.fills):
            return (
                f"{self.name} {value} names one place for all rollouts. Put {{rollout_id}} into it."
            )
        return None


def flag(name: str, help: str = "", *, default: Any = MISSING, **kw: Any) -> Any:
    """A dataclass field that a flag fills. Without a default the flag is required."""
    metadata = {"flag": Flag(name, help, **kw)}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def json_object(text: str) -> dict[str, Any]:
    """Raises ValueError for other JSON and for text that is not JSON."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def flag_of(f: Field) -> Flag | None:
    return f.metadata.get("flag")


def default_of(f: Field) -> Any:
    """The default of a field; MISSING if the field must be set."""
    return f.default if f.default_factory is MISSING else f.default_factory()


@cache
def flags_in(section: type) -> dict[str, Flag]:
    """{field name: Flag} of a section, in the order of declaration."""
    return {f.name: spec for f in fields(section) if (spec := flag_of(f))}


class Section:
    """A part of the configuration. Building it with values that cannot work raises ConfigError."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def changed(self, **values: Any) -> Self:
        """A copy with other values, which are not checked."""
        other = copy(self)
        for name, value in values.items():
            object.__setattr__(other, name, value)
        return other

    def __post_init__(self) -> None:
        own = (spec.problem(getattr(self, name)) for name, spec in flags_in(type(self)).items())
        if problems := [*filter(None, own), *self.misfits()]:
            raise ConfigError(*problems)

    def misfits(self) -> Iterator[str]:
        """The problems of values of this section that do not fit each other."""
        for f in fields(self):
            spec, default = flag_of(f), default_of(f)
            if spec and spec.only_with and (value := getattr(self, f.name, default)) != default:
                said = spec.name if value is True else f"{spec.name} {value}"
                if not self._has(spec.only_with):
                    yield (
                        f"{said} has no effect without {spec.only_with}. Add that, or leave it out."
                    )
        yield from self.problems()

    def _has(self, flags: str) -> bool:
        """Whether every flag of "--use-opd --opd-type vllm" has that value."""
        fields_of = {spec.name: name for name, spec in flags_in(type(self)).items()}
        words = flags.split()
        for name, word in zip(words, [*words[1:], ""], strict=True):
            if name.startswith("--"):
                value = getattr(self, fields_of[name])
                if not (value if word.startswith("--") or not word else value == word):
                    return False
        return True

    def plugin(self, name: str) -> Plugin | None:
        """The user's function whose path the field `name` holds; None if it is unset."""
        return next(iter(self.plugins(name)), None)

    def plugins(self, name: str) -> list[Plugin]:
        """The user's functions of a field that may hold several paths."""
        spec, value = flags_in(type(self))[name], getattr(self, name)
        assert spec.hook is not None, name
        if not value:  # as for most fields; a rollout asks for each sample
            return []
        asked = [hook for other, hook in (spec.hook_if or {}).items() if getattr(self, other)]
        paths = value if isinstance(value, list) else [value]
        return [Plugin(spec.name, path, asked[0] if asked else spec.hook) for path in paths]

    def own_plugins(self) -> list[Plugin]:
        """Every function that this section names, except vime's defaults."""
        return [
            plugin
            for f in fields(self)
            if (spec := flag_of(f)) and spec.hook and getattr(self, f.name) != default_of(f)
            for plugin in self.plugins(f.name)
        ]

    def problems(self) -> Iterator[str]:
        """The part of `misfits` that a section adds itself."""
        return iter(())
