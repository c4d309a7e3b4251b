"""Which processes are alive, for tests that start servers and end them."""

from __future__ import annotations

from pathlib import Path


def group_members(pgid: int) -> list[int]:
    """The live processes of a group: the server, EngineCore and their children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == pgid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
