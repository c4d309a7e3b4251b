"""--megatron-config-path: a YAML file of flags that differ between actor and critic.

    megatron:
      - name: default             # vime ignores this key
        role: critic              # or actor
        overrides:
          lr: 1e-5                # a flag as plugins spell it, such as lr_warmup_iters

Overrides of the actor count like flags on the command line; overrides of the critic change the
critic only. A role without an entry has the values of the command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vime.cli.command_line import Given, add
from vime.cli.flags import MODEL_ARGS, STATED_FLAGS, Entry, all_flags
from vime.config.spelling import as_flag, as_key, did_you_mean
from vime.config.yaml_file import read_yaml
from vime.errors import ConfigError

ACTORS_OWN = ("model", "parallel", "optimizer", "checkpoint", "algorithm", MODEL_ARGS, STATED_FLAGS)
WHOLE = ("freeze_names", "train_names", "critic_lr", "critic_lr_warmup_iters")


def add_roles(given: Given) -> None:
    """Adds the overrides of the file, and its problems, to the command line."""
    path = given.values["optimizer"].get("role_file")
    if path is None:
        return
    name = f"--megatron-config-path {path}"
    try:
        roles = dict(_roles(read_yaml(name, path), name))
    except ConfigError as error:
        given.problems += error.problems
        return
    for role, overrides in roles.items():
        said = _read(overrides, f"{name}: {role}", given.problems, of_critic=role == "critic")
        given.notices += [f"{name}: {role}: {notice}" for notice in said.notices]
        if role == "critic":
            _merge_critic(given, said.values["optimizer"], name)
        else:
            _merge_actor(given, said, name)


def _roles(content: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(role, its overrides). Raises ConfigError."""
    entries = content.get("megatron") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(
            f"{name} has no list under `megatron:`. Write entries with role and overrides."
        )
    roles = [entry.get("role") for entry in entries]
    for entry, role in zip(entries, roles, strict=True):
        if role not in ("actor", "critic") or roles.count(role) > 1:
            raise ConfigError(
                f"{name}: role {role!r} is unknown or repeated. Write one entry per role."
            )
        if unknown := sorted(map(str, entry.keys() - {"name", "role", "overrides"})):
            raise ConfigError(
                f"{name}: {unknown[0]} is not a key of an entry. Move it under `overrides:`."
            )
        overrides = entry.get("overrides") or {}
        if not isinstance(overrides, dict):
            raise ConfigError(
                f"{name}: the overrides of {role} are not a mapping. Write `flag: value`."
            )
        yield role, overrides


def _read(overrides: dict[str, Any], where: str, problems: list[str], *, of_critic: bool) -> Given:
    """The overrides as a command line."""
    said = Given()
    for key, value in overrides.items():
        flag = as_flag(str(key))
        entry = all_flags().get(flag)
        if entry is None:
            hint = did_you_mean(flag, all_flags(), shown=as_key)
            problems.append(f"{where}: {key} is not a flag. {hint}".rstrip())
        elif of_critic and (entry.owner != "optimizer" or entry.field in WHOLE):
            problems.append(f"{where}: {key} cannot differ for the critic. Leave it out.")
        elif not of_critic and entry.owner not in ACTORS_OWN:
            problems.append(
                f"{where}: {key} holds for the whole run. Give {flag} on the command line."
            )
        elif value is not None:
            _take(said, entry, value)
    problems += [f"{where}: {problem}" for problem in said.problems]
    return said


def _take(said: Given, entry: Entry, value: Any) -> None:
    if value is False and entry.is_switch:
        if entry.owner not in (MODEL_ARGS, STATED_FLAGS):
            said.values[entry.owner][entry.field] = not entry.switch_value
        return
    words = value if isinstance(value, list) else [] if value is True else [value]
    add(said, entry, [json.dumps(w) if isinstance(w, dict) else str(w) for w in words])


def _merge_actor(given: Given, said: Given, name: str) -> None:
    for owner, values in said.values.items():
        for field, value in values.items():
            have = given.values[owner].setdefault(field, value)
            if have != value:
                flag = next(
                    n for n, e in all_flags().items() if (e.owner, e.field) == (owner, field)
                )
                given.problems.append(
                    f"{name} gives {value}, and the command line {flag} {have}. Give it once."
                )


def _merge_critic(given: Given, values: dict[str, Any], name: str) -> None:
    for field, flag in (("lr", "--critic-lr"), ("lr_warmup_iters", "--critic-lr-warmup-iters")):
        have = given.values["optimizer"].get(f"critic_{field}")
        if field in values and have is not None:
            given.problems.append(
                f"{name} gives {values[field]} for the critic, and the command line {flag} "
                f"{have}. Give it once."
            )
    given.values["optimizer"]["critic_overrides"] = values
