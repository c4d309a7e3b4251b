"""The command line as a `Config`, or every reason why it cannot be one, at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any, NoReturn

from vime.cli.command_line import Given, read
from vime.cli.flags import MODEL_ARGS, section_types
from vime.cli.roles import add_roles
from vime.cli.router_flags import check_router_flags
from vime.config import Config
from vime.config.fields import Section, flag_of, flags_in
from vime.config.notices import notices
from vime.config.own_values import read_own_values
from vime.config.rules import CONVERT_RULES, RULES
from vime.data.checks import data_problems
from vime.errors import ConfigError

Check = Callable[[Config], Iterable[str]]


def parse_config(argv: Sequence[str] | None = None, checks: Iterable[Check] = ()) -> Config:
    """The configuration that a training command line asks for.

    argv    words after the program's name; default `sys.argv[1:]`
    checks  further `Callable[[Config], Iterable[str]]`, each problem with flag, value and remedy

    Prints notices to stderr. With any problem, prints them all and exits with code 2; `--help`
    and `--dry-run` print and exit with code 0. Imports no engine, trainer or Ray.
    """
    cfg = _parse(read(argv), [*RULES, data_problems, check_router_flags, *checks])
    for notice in notices(cfg):
        print(f"note: {notice}", file=sys.stderr)
    cfg = settled(cfg)
    if cfg.debug.dry_run:
        from vime.cli.dry_run import report

        print(report(cfg))
        raise SystemExit(0)
    return cfg


def parse_convert_config(argv: Sequence[str] | None = None, checks: Iterable[Check] = ()) -> Config:
    """The same for a checkpoint converter: model, layout and `--save`; defaults elsewhere."""
    given = read(argv)
    given.values["batch"].setdefault("prompts", 1)
    return settled(_parse(given, [*CONVERT_RULES, *checks]))


def settled(cfg: Config) -> Config:
    """The values that a notice says are set otherwise than asked."""
    if cfg.parallel.sequence_parallel and cfg.parallel.tp == 1:
        return replace(cfg, parallel=replace(cfg.parallel, sequence_parallel=False))
    return cfg


def _parse(given: Given, rules: Iterable[Check]) -> Config:
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
        problems += _reachable(sections[name].misfits())
    draft = Config(**sections)
    for rule in rules:
        problems += _run(rule, draft, follows=bool(problems))
    if problems:
        _refuse(problems)
    return Config(**{name: section(**values[name]) for name, section in section_types().items()})


def _draft(
    section: type[Any], values: dict[str, Any], broken: set[str]
) -> tuple[Section, list[str]]:
    """The section unchecked. A field without a usable value stays unset, so that reading it
    raises AttributeError and the rules that need it pass over in silence."""
    draft, problems = object.__new__(section), []
    for f in fields(section):
        if f.name in broken:
            continue
        if f.name in values:
            object.__setattr__(draft, f.name, values[f.name])
        elif f.default_factory is not MISSING:
            object.__setattr__(draft, f.name, f.default_factory())
        elif f.default is not MISSING:
            object.__setattr__(draft, f.name, f.default)
        elif spec := flag_of(f):
            problems.append(f"{spec.name} is missing: {spec.help}. Add {spec.name} VALUE.")
    return draft, problems


def _reachable(problems: Iterator[str]) -> list[str]:
    """What a section finds, up to where it would read an unset field."""
    found = []
    try:
        for problem in problems:
            found.append(problem)
    except AttributeError:
        pass
    return found


def _run(rule: Check, draft: Config, *, follows: bool) -> list[str]:
    """A rule's findings. Where something is wrong already, a rule may trip over that: then what
    it trips over has been reported, and what it would say comes with the next attempt."""
    found = []
    try:
        for problem in rule(draft):
            found.append(problem)
    except ConfigError as error:
        found += error.problems
    except PermissionError as error:
        found.append(_out_of_reach(draft, str(error.filename)))
    except Exception:
        if not follows:
            raise
    return found


def _out_of_reach(draft: Config, path: str) -> str:
    """What to say of a path that this user may not look into, with the flags that led there."""
    names = [
        f"{spec.name} {value}"
        for owner, section in section_types().items()
        for name, spec in flags_in(section).items()
        if isinstance(value := getattr(getattr(draft, owner), name, None), str)
        and (path == value or path.startswith(value + "/"))
    ]
    return (
        f"{' and '.join(names) or path}: this user may not look into {path}. Choose another place, "
        "or open that one."
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
