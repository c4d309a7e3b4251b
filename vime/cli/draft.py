"""Makes a `Config` from the values of a command line, or reports all its problems together.

Rules check a draft of the configuration. A field without a usable value is missing in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from vime.cli.command_line import Given
from vime.cli.flags import MODEL_ARGS, section_types
from vime.cli.roles import add_roles
from vime.config import Config
from vime.config.fields import Section, default_of, flag_of, flags_in
from vime.config.own_values import read_own_values
from vime.errors import ConfigError

Check = Callable[[Config], Iterable[str]]


def checked(given: Given, rules: Iterable[Check]) -> Config:
    """The configuration. Prints all problems and exits with code 2 if there are any."""
    add_roles(given)
    values = {name: dict(given.values.get(name, {})) for name in section_types()}
    values["model"]["args"] = dict(given.values.get(MODEL_ARGS, {}))
    values["engine"]["vllm_args"] = dict(given.vllm_args)
    values["engine"]["router_args"] = dict(given.router_args)
    problems = list(given.problems)
    try:
        if path := values["rollout"].get("custom_config_path"):
            values["rollout"]["own_values"] = read_own_values(path)
    except ConfigError as error:
        problems += error.problems

    sections = {}
    for name, section in section_types().items():
        sections[name], missing = _draft(section, values[name], given.broken.get(name, set()))
        problems += missing
        problems += _up_to_a_missing_field(sections[name].misfits())
    draft = Config(**sections)
    for rule in rules:
        problems += _run(rule, draft, tolerant=bool(problems))
    if problems:
        _refuse(problems)
    return Config(**{name: section(**values[name]) for name, section in section_types().items()})


def _draft(
    section: type[Any], values: dict[str, Any], broken: set[str]
) -> tuple[Section, list[str]]:
    """A section without its checks, and a problem for each required flag that is missing.

    Reading a field without a usable value raises AttributeError.
    """
    draft, problems = object.__new__(section), []
    for f in fields(section):
        if f.name in broken:
            continue
        value = values.get(f.name, default_of(f))
        if value is not MISSING:
            object.__setattr__(draft, f.name, value)
        elif spec := flag_of(f):
            problems.append(f"{spec.name} is missing: {spec.help}. Add {spec.name} VALUE.")
    return draft, problems


def _up_to_a_missing_field(problems: Iterator[str]) -> list[str]:
    found = []
    try:
        for problem in problems:
            found.append(problem)
    except AttributeError:
        pass
    return found


def _run(rule: Check, draft: Config, *, tolerant: bool) -> list[str]:
    """The problems that a rule finds.

    tolerant  whether to ignore an error of the rule: the draft has other problems, which may cause
              it. Once the user has corrected these, the rule runs again
    """
    found = []
    try:
        for problem in rule(draft):
            found.append(problem)
    except ConfigError as error:
        found += error.problems
    except PermissionError as error:
        found.append(_out_of_reach(draft, str(error.filename)))
    except Exception:
        if not tolerant:
            raise
    return found


def _out_of_reach(draft: Config, path: str) -> str:
    """The problem of a path that this user may not read, with the flags that led to it."""
    names = [
        f"{spec.name} {value}"
        for owner, section in section_types().items()
        for name, spec in flags_in(section).items()
        if isinstance(value := getattr(getattr(draft, owner), name, None), str)
        and (path == value or path.startswith(value + "/"))
    ]
    return (
        f"{' and '.join(names) or path}: this user may not read {path}. Choose another place, or "
        "change its permissions."
    )


def _refuse(problems: list[str]) -> NoReturn:
    unique = list(dict.fromkeys(problems))
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    lines = "".join(f"  - {problem}\n" for problem in unique)
    print(
        f"vime: {count} in the configuration; nothing was started.\n{lines}",
        file=sys.stderr,
        end="",
    )
    raise SystemExit(2)
