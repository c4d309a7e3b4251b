"""YAML files that a flag names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vime.errors import ConfigError


def read_yaml(name: str, path: str) -> Any:
    """The file's content. Raises ConfigError if it is not YAML.

    name  flag and path, for the error
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}). Correct the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{name} is not YAML: {where}. Correct the file.") from None
