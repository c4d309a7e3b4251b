"""A folder of checkpoints, and the tracker that commits one of them.

    FOLDER/iter_0000019/                        one directory per saved rollout
    FOLDER/iter_0000019/manifest.json           every file of the commit and its size in bytes
    FOLDER/rollout/*_19.pt                      data cursor and buffer; a rollout generated ahead
    FOLDER/release/                             converted weights, without training state
    FOLDER/latest_checkpointed_iteration.txt    "19" or "release"; writing it is the commit

The tracker is written last. A directory that it does not name is old or unfinished, so a crash
during a save leaves the previous checkpoint in force. A save never writes into the directory that
the tracker names: if a run went back with --ckpt-step and saves that iteration again, it first
moves the tracker back to an older one.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from vime.errors import CheckpointError
from vime.files import write_text

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"  # a file in a directory from the start of a save until its manifest
DAMAGED = "Copy the checkpoint again, or choose an earlier one with --ckpt-step."


def iteration_folder(folder: str | Path, iteration: int | None) -> Path:
    """FOLDER/iter_NNNNNNN, or FOLDER/release for None."""
    return Path(folder) / (RELEASE if iteration is None else f"iter_{iteration:07d}")


def iterations_in(folder: str | Path) -> dict[int, Path]:
    """{iteration: its directory} of every checkpoint in a folder, finished or not."""
    found = {p: _ITERATION.fullmatch(p.name) for p in Path(folder).glob("iter_*")}
    return {int(match[1]): path for path, match in found.items() if match and path.is_dir()}


_ITERATION = re.compile(r"iter_(\d{7,})")


def data_files(folder: str | Path, iteration: int) -> list[Path]:
    """Files that the data source and the rollout manager saved with this iteration's weights."""
    return list((Path(folder) / "rollout").glob(f"*[!0-9]{iteration}.pt"))


def committed(folder: str | Path) -> str | None:
    """The tracker's text, a number or "release". None without a tracker.

    Raises CheckpointError when the tracker holds any other text.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.is_file():
        return None
    latest = tracker.read_text().strip()
    if latest != RELEASE and not latest.isdigit():
        raise CheckpointError(
            f"{tracker} holds {latest!r}, neither a number nor {RELEASE!r}. "
            "Write the number of a complete iter_* directory into it."
        )
    return latest


def begin_save(folder: str | Path, iteration: int | None) -> Path:
    """Makes the directory of a save. If the tracker names it already, moves the tracker back.

    One process calls this before anything of the iteration is written, including the data source's
    files. May be called twice. Returns the directory.
    """
    target = iteration_folder(folder, iteration)
    name = RELEASE if iteration is None else str(iteration)
    if committed(folder) == name and (target / MANIFEST).is_file():
        _move_tracker_back(Path(folder), iteration)
    target.mkdir(parents=True, exist_ok=True)
    (target / UNFINISHED).touch()
    (target / MANIFEST).unlink(missing_ok=True)
    return target


def _move_tracker_back(folder: Path, iteration: int | None) -> None:
    older = [
        i
        for i, path in iterations_in(folder).items()
        if (path / MANIFEST).is_file() and (iteration is None or i < iteration)
    ]
    if older:
        write_text(folder / TRACKER, str(max(older)))
    else:
        (folder / TRACKER).unlink()


def commit_checkpoint(folder: str | Path, iteration: int | None) -> None:
    """Writes the manifest, then the iteration (None: "release") into the tracker, atomically.

    One rank calls this after everything else is on disk.
    """
    target = iteration_folder(folder, iteration)
    of_data = [] if iteration is None else data_files(folder, iteration)
    own = (MANIFEST, UNFINISHED)
    files = sorted(p for p in [*target.iterdir(), *of_data] if p.name not in own)
    sizes = {os.path.relpath(p, folder): p.stat().st_size for p in files}
    write_text(target / MANIFEST, json.dumps({"iteration": iteration, "files": sizes}, indent=1))
    (target / UNFINISHED).unlink(missing_ok=True)
    write_text(Path(folder) / TRACKER, RELEASE if iteration is None else str(iteration))


def check_manifest(directory: Path, *, with_data: bool) -> None:
    """Compares the files of one iter_* or release directory with its manifest.

    with_data  include the data source's files, which only a resumed run reads
    Raises CheckpointError naming the first file that is missing or has another size, or a save that
    was not finished. A directory without a manifest that another program wrote passes.
    """
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / UNFINISHED).is_file():
            raise CheckpointError(f"{directory} was not finished: its save was cut off. {DAMAGED}")
        return
    try:
        files = json.loads(path.read_text())["files"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). {DAMAGED}") from None
    for name, size in files.items():
        file = directory.parent / name
        if file.parent.name != "rollout":
            file = directory / file.name  # the directory may have been renamed
        elif not with_data:
            continue
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete. {DAMAGED}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, not {size}: it was cut off or "
                f"overwritten. {DAMAGED}"
            )
