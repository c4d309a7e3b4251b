"""A configuration from values by section, without a command line."""

from __future__ import annotations

from typing import Any

from vime.cli.flags import section_types
from vime.config import Config


def config_of(**sections: dict[str, Any]) -> Config:
    """`config_of(batch={"prompts": 1})`: every section that is not given has its defaults."""
    types = section_types()
    return Config(**{name: types[name](**sections.get(name, {})) for name in types})
