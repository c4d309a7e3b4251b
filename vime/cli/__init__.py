"""From the command line to a `Config`. Only entry points and tools import this room."""

from vime.cli.parse import parse_config, parse_convert_config

__all__ = ["parse_config", "parse_convert_config"]
