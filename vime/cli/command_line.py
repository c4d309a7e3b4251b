"""Turns the words of a command line into values of fields, and collects all mistakes.

argparse splits the words and prints the help. It does not convert them, because it would stop at
the first mistake.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vime.cli.absent_flags import ABSENT
from vime.cli.flags import STATED_FLAGS, Entry, all_flags
from vime.cli.help import HelpFormatter, describe, help_of
from vime.cli.megatron_flags import BF16, IDLE, STATED, is_megatrons
from vime.config.spelling import as_key, did_you_mean, nearest
from vime.errors import ConfigError

VLLM, ROUTER = "--vllm-", "--router-"
OWN_FLAGS = {  # {prefix of vLLM's or the router's flags: vime's own flags with that prefix}
    prefix: tuple(name for name in all_flags() if name.startswith(prefix))
    for prefix in (VLLM, ROUTER)
}


@dataclass(slots=True)
class Given:
    """The content of a command line.

    values       {section: {field: value}} of the given flags
    broken       {section: {fields with an unusable value}}
    vllm_args    {"gpu_memory_utilization": "0.7", "enforce_eager": True}
    router_args  the same for --router-*
    """

    values: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    broken: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    vllm_args: dict[str, Any] = field(default_factory=dict)
    router_args: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read(argv: Sequence[str] | None, prog: str | None = None) -> Given:
    """Reads a command line (default: `sys.argv`). `--help` prints and exits."""
    namespace, unknown = _parser(prog).parse_known_args(argv)
    given = Given()
    for name, words in namespace.given:
        add(given, all_flags()[name], words)
    _take_unknown(given, unknown)
    return given


class _Collect(argparse.Action):
    """Appends (flag, its words) in the order of the command line."""

    def __call__(self, parser, namespace, values, option_string=None):
        words = [values] if isinstance(values, str) else list(values or [])
        namespace.given.append((option_string, words))


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.set_defaults(given=[])
    groups: dict[str, Any] = {}
    for name, entry in all_flags().items():
        if entry.owner not in groups:
            groups[entry.owner] = parser.add_argument_group(*describe(entry.owner))
        groups[entry.owner].add_argument(
            name, nargs="*", action=_Collect, dest=argparse.SUPPRESS, help=help_of(entry)
        )
    return parser


def add(given: Given, entry: Entry, words: list[str]) -> None:
    """Adds one flag with its words, or the problem with them."""
    if problem := _word_count_problem(entry, words):
        given.problems.append(problem)
        given.broken[entry.owner].add(entry.field)
    elif entry.name == BF16:
        given.values["model"]["dtype"] = "bfloat16"
    elif entry.name in IDLE:
        said = " ".join([entry.name, *words])
        given.notices.append(f"{said} changes nothing: {IDLE[entry.name].because}.")
    elif entry.owner == STATED_FLAGS:
        given.problems += _contradiction(entry.name, words)
    elif entry.is_switch:
        _set(given, entry, entry.switch_value)
    else:
        try:
            values = [_finite(entry.parse(word)) for word in words]
        except ConfigError as error:
            given.problems += error.problems
            given.broken[entry.owner].add(entry.field)
        except ValueError:
            given.problems.append(_unreadable(entry, words))
            given.broken[entry.owner].add(entry.field)
        else:
            _set(given, entry, values if entry.nargs else values[0])


def _set(given: Given, entry: Entry, value: Any) -> None:
    """Sets a field. The last of several values wins, even if an earlier one is unusable."""
    problem = entry.spec.problem(value) if entry.spec and not entry.nargs else None
    if problem:
        given.problems.append(problem)
        given.broken[entry.owner].add(entry.field)
        return
    given.broken[entry.owner].discard(entry.field)
    if entry.spec and entry.spec.repeats:
        value = given.values[entry.owner].get(entry.field, []) + value
    given.values[entry.owner][entry.field] = value


def _word_count_problem(entry: Entry, words: list[str]) -> str | None:
    said = " ".join([entry.name, *words])
    if entry.is_switch and words:
        return f"{said}: a switch takes no value. Write {entry.name} alone, or leave it out."
    if not entry.is_switch and not words:
        return f"{entry.name} has no value. Write {entry.name} VALUE, or leave it out."
    if not entry.is_switch and entry.nargs is None and len(words) > 1:
        return (
            f"{said}: the flag takes one value, not {len(words)}. "
            f"Keep one, or put quotes around all ({entry.name} '{' '.join(words)}')."
        )
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(value)
    return value


def _unreadable(entry: Entry, words: list[str]) -> str:
    kind = {int: "a whole number", float: "a number"}.get(entry.parse, "a JSON object")
    example = {int: "8", float: "0.1"}.get(entry.parse, """'{"key": true}'""")
    return f"{entry.name} {' '.join(words)} is not {kind}. Give {kind}, such as {example}."


def _contradiction(name: str, words: list[str]) -> list[str]:
    stated = STATED[name]
    if not stated.values or words[0] in stated.values:
        return []
    fitting = " or ".join(stated.values)
    return [
        f"{name} {words[0]} is not possible: {stated.because}. Give {fitting}, or leave it out."
    ]


def _take_unknown(given: Given, words: list[str]) -> None:
    """Flags of vLLM and of its router go to their own parsers; all others are mistakes."""
    for name, values in _split(words):
        if name in ABSENT:
            said = " ".join([name, *values])
            given.problems.append(f"{said}: vime has no such flag; {ABSENT[name]}. Leave it out.")
            continue
        prefix = next((p for p in OWN_FLAGS if name.startswith(p) and len(name) > len(p)), "")
        slip = nearest(name, OWN_FLAGS.get(prefix, ()), cutoff=0.92)
        if prefix and not slip:
            taken = given.vllm_args if prefix == VLLM else given.router_args
            key = as_key(name.removeprefix(prefix))
            taken[key] = True if not values else values[0] if len(values) == 1 else values
        elif is_megatrons(name):
            said = " ".join([name, *values])
            given.problems.append(
                f"{said} is a Megatron flag that vime does not support. Leave it out."
            )
        elif name.startswith("-"):
            known = [slip] if slip else all_flags()
            hint = did_you_mean(name, known, otherwise="--help lists every flag.")
            given.problems.append(f"{' '.join([name, *values])} is not a known flag. {hint}")
        else:
            given.problems.append(
                f"{name} belongs to no flag. Remove it, or add the flag before it."
            )


def _split(words: list[str]) -> list[tuple[str, list[str]]]:
    """["--vllm-a", "1", "--vllm-b=2"] -> [("--vllm-a", ["1"]), ("--vllm-b", ["2"])]."""
    split: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            split.append((name, [value] if equals else []))
        elif split and split[-1][0].startswith("--"):
            split[-1][1].append(word)
        else:
            split.append((word, []))
    return split
