"""Writes files so that they appear whole or not at all, also when the writer is killed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(path: Path) -> Path:
    """A new path to write to before `commit`: a hidden file beside `path`, for the caller only.

    A process id would not do: on other nodes, processes of the same id may share the folder.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def commit(partial: Path, path: Path) -> None:
    """Waits until the bytes of a finished file are on the disk, then gives it its name."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a path to write to. If the block ends without an error, the file moves to `path`.

        with written_whole(path) as partial:
            torch.save(state, partial)

    Makes the folder if it is missing. Readers see either the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Like `path.write_text(text)`, but the file appears whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
