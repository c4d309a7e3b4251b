"""--custom-config-path: a YAML file of the user's own values, which plugins read as `args.NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vime.config import Config
from vime.config.spelling import as_flag
from vime.config.view import resolved
from vime.config.yaml_file import read_yaml
from vime.errors import ConfigError


def read_own_values(path: str) -> dict[str, Any]:
    """{name: value}. Raises ConfigError when the file holds something else."""
    name = f"--custom-config-path {path}"
    content = read_yaml(name, path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"{name} is not a mapping of names to values. Write lines of `name: value`."
        )
    return content


def own_values_are_their_own(cfg: Config) -> Iterator[str]:
    """The file must not set a flag: `args` would show its value, and the run would use another."""
    own = cfg.rollout.own_values
    for name in sorted(own.keys() & resolved(cfg).keys() if own else ()):
        yield (
            f"--custom-config-path {cfg.rollout.custom_config_path}: vime uses the name {name}. "
            f"Give {as_flag(name)} on the command line, or choose another name."
        )
