"""--custom-config-path: a YAML file of the user's own values, which plugins read as `args.NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vime.config.yaml_file import read_yaml
from vime.errors import ConfigError

if TYPE_CHECKING:
    from vime.config import Config


def own_values(path: str | None) -> dict[str, Any]:
    """{name: value}; {} without a file. Raises ConfigError when it cannot be read as that."""
    if path is None:
        return {}
    name = f"--custom-config-path {path}"
    content = read_yaml(name, path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{name} is no mapping of names to values. Write lines of `name: value`.")
    return content


def own_values_are_their_own(cfg: Config) -> Iterator[str]:
    """A file may not set what a flag sets: it would say one thing and the run do another."""
    from vime.config.view import resolved

    path = cfg.rollout.custom_config_path
    try:
        own = own_values(path)
    except ConfigError as error:
        yield from error.problems
        return
    for name in sorted(own.keys() & resolved(cfg).keys() if own else ()):
        flag = "--" + name.replace("_", "-")
        yield (
            f"--custom-config-path {path}: {name} is vime's own. Give {flag} on the command line, "
            "or choose another name."
        )
