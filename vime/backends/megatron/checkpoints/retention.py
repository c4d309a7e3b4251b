"""Deletes old checkpoints (--keep-last)."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from vime.backends.megatron.checkpoints.commit import (
    RELEASE,
    committed,
    data_files,
    iterations_in,
)

log = logging.getLogger(__name__)


def delete_old_checkpoints(folder: str | Path, keep_last: int | None) -> None:
    """Deletes the iter_* directories older than the `keep_last` newest (None: deletes nothing).

    One rank calls this after a commit. It keeps the directory that the tracker names, and neither
    counts nor touches later iterations. A directory that cannot be deleted is logged and stays:
    this is no reason to stop, because the new checkpoint is safe.
    """
    latest = committed(folder)
    if keep_last is None or latest in (None, RELEASE):
        return
    found = iterations_in(folder)
    for iteration in sorted(i for i in found if i <= int(latest))[:-keep_last]:
        doomed = Path(folder) / f".deleting_{found[iteration].name}"
        try:
            os.replace(found[iteration], doomed)  # one step: --ckpt-step never finds half of it
            shutil.rmtree(doomed)
            for path in data_files(folder, iteration):
                path.unlink()
        except OSError as error:
            log.warning("--keep-last %d: cannot delete %s (%s)", keep_last, found[iteration], error)
