"""A cache for the answers of vLLM's flag parser, whose import takes about 14 s."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vime.files import write_text


class Verdicts:
    """One file per vLLM version, in the user's cache folder. A damaged file counts as empty.

    names  every flag that vLLM knows, without leading dashes; empty before the first answer
    """

    def __init__(self, version: str) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        self.file = home / "vime" / f"vllm-flags-{version}.json"
        try:
            held = json.loads(self.file.read_text())
            self.names = {str(name) for name in held["names"]}
            self.known = {str(key): why for key, why in held["verdicts"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.names: set[str] = set()
            self.known: dict[str, str | None] = {}

    def has(self, name: str) -> bool:
        """Whether vLLM knows the flag. In a name with dots, the part before them is the flag."""
        return name.split(".")[0] in self.names

    def knows(self, name: str, value: Any) -> bool:
        return _key(name, value) in self.known

    def why(self, name: str, value: Any) -> str | None:
        """Why vLLM refuses the value; None if vLLM accepts it."""
        return self.known[_key(name, value)]

    def learn(self, given: dict[str, Any], refused: dict[str, str]) -> None:
        """Keeps the parser's answers. If the file cannot be written, the next check asks again."""
        self.known |= {_key(name, value): refused.get(name) for name, value in given.items()}
        try:
            content = {"names": sorted(self.names), "verdicts": self.known}
            write_text(self.file, json.dumps(content))
        except OSError:
            return


def _key(name: str, value: Any) -> str:
    return json.dumps([name, value])
