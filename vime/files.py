"""Files that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Where to write a file that `commit` will name `path`: beside it, hidden, of this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def commit(partial: Path, path: Path) -> None:
    """Gives a finished file its name, once its bytes are on the disk."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields the path to write to. `path` gets its content when the block ends without an error.

        with written_whole(path) as partial:
            torch.save(state, partial)

    The folder is made if it is missing. Readers see the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`path.write_text(text)`, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
