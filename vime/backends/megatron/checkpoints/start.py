"""Where a run starts: the folders of checkpoints, and the tracker that commits one."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vime.backends.megatron.hf.check import check_hf_fits
from vime.backends.megatron.hf.files import HFFiles
from vime.config import Config
from vime.errors import CheckpointError
from vime.files import write_text

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
MANIFEST = "manifest.json"  # of an iter_* or release directory: every file of the commit, in bytes


@dataclass(frozen=True, slots=True)
class Start:
    """Where weights come from, and whether a run continues there.

    folder     an HF folder, or one `iter_*` or `release` directory
    is_hf      which of the two
    iteration  the rollout it was saved after; None for converted or HF weights
    resume     load optimizer, scheduler and RNG too, and go on at iteration + 1
    """

    folder: Path
    is_hf: bool
    iteration: int | None = None
    resume: bool = False

    @property
    def rollout_id(self) -> int:
        """The first rollout to train."""
        return self.iteration + 1 if self.resume and self.iteration is not None else 0


def resolve(
    load: str | None,
    ref_load: str | None = None,
    hf_checkpoint: str | None = None,
    ckpt_step: int | None = None,
) -> Start:
    """Where the actor starts: --load if it holds a checkpoint, or --ref-load, or --hf-checkpoint.

    Each may be a checkpoint folder or a plain HF folder. `ckpt_step` picks an iteration of --load,
    or of --ref-load when there is no --load. Only an iteration in --load is continued; all else
    starts at rollout 0. For the reference model call `resolve(None, ref_load, hf, ref_ckpt_step)`.
    Raises CheckpointError.
    """
    if load and (start := _in_folder(Path(load), "--load", ckpt_step)):
        return Start(start.folder, start.is_hf, start.iteration, start.iteration is not None)
    if load and ckpt_step is not None:
        raise CheckpointError(
            f"--load {load} holds no checkpoint, yet --ckpt-step asks for {ckpt_step}. Drop one."
        )
    if ref_load:
        return _weights_in(Path(ref_load), "--ref-load", ckpt_step)
    if hf_checkpoint:
        return Start(Path(hf_checkpoint), is_hf=True)
    raise CheckpointError("No weights to start from: give --hf-checkpoint, --ref-load or --load.")


def teacher_start(cfg: Config) -> Start:
    """Where the teacher of --use-opd is. Raises CheckpointError."""
    return _weights_in(Path(cfg.checkpoint.opd_teacher_load), "--opd-teacher-load")


def check_start(cfg: Config) -> list[str]:
    """What is wrong with the folders that a trainer would start from, before one does."""
    files, hf = cfg.checkpoint, cfg.model.hf_checkpoint
    if cfg.debug.rollout_only or files.ref_load and not Path(files.ref_load).is_dir():
        return []  # the second is told by the rule `reference_is_there`
    if not (Path(hf) / "config.json").is_file():
        return []  # `checkpoint_is_there`
    asked = [partial(resolve, files.load, files.ref_load, hf, files.ckpt_step)]
    if cfg.algorithm.needs_reference:
        asked.append(partial(resolve, None, files.ref_load, hf, files.ref_ckpt_step))
    teacher = files.opd_teacher_load
    if cfg.algorithm.needs_teacher and teacher and Path(teacher).is_dir():  # `teacher_is_there`
        asked.append(partial(teacher_start, cfg))
    problems = []
    for find in asked:
        try:
            start = find()
            check_manifest(start)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        try:
            if start.is_hf:
                check_hf_fits(cfg, start.folder)
                if not cfg.debug.dry_run:  # a plan needs no weights
                    HFFiles(start.folder)
        except CheckpointError as error:
            given = {
                "--load": files.load,
                "--ref-load": files.ref_load,
                "--hf-checkpoint": hf,
                "--opd-teacher-load": teacher,
            }
            flag = next(f for f, path in given.items() if path and Path(path) == start.folder)
            problems.append(f"{flag} {start.folder}: {error}")
    return list(dict.fromkeys(problems))


def _weights_in(folder: Path, flag: str, step: int | None = None) -> Start:
    start = _in_folder(folder, flag, step)
    if start is None:
        raise CheckpointError(
            f"{flag} {folder} holds neither a checkpoint ({TRACKER}) nor an HF model "
            "(config.json). Make one with tools/convert_hf_to_torch_dist.py, or drop the flag."
        )
    return start


def _in_folder(folder: Path, flag: str, step: int | None) -> Start | None:
    tracker = folder / TRACKER
    if tracker.is_file():
        latest = tracker.read_text().strip()
        if latest != RELEASE and not latest.isdigit():
            raise CheckpointError(
                f"{tracker} holds {latest!r}, neither a number nor {RELEASE!r}. "
                "Write the number of a complete iter_* directory into it."
            )
        iteration = step if step is not None else None if latest == RELEASE else int(latest)
        found = iteration_folder(folder, iteration)
        if not found.is_dir():
            named = "--ckpt-step" if step is not None else str(tracker)
            present = sorted(p.name for p in folder.glob("iter_*"))
            raise CheckpointError(
                f"{flag} {folder}: {named} names {found.name}, which does not exist. "
                f"Present: {', '.join(present) or 'none'}."
            )
        return Start(found, is_hf=False, iteration=iteration)
    if step is not None and folder.is_dir():
        raise CheckpointError(f"{flag} {folder} has no {TRACKER}, so no iteration {step} either.")
    if (folder / "config.json").is_file():
        return Start(folder, is_hf=True)
    if (folder / "metadata.json").is_file():  # an iter_* directory given directly
        return Start(folder, is_hf=False)
    return None


def iteration_folder(folder: str | Path, iteration: int | None) -> Path:
    """FOLDER/iter_NNNNNNN, or FOLDER/release for None."""
    return Path(folder) / (RELEASE if iteration is None else f"iter_{iteration:07d}")


def commit_checkpoint(folder: str | Path, iteration: int | None) -> None:
    """Writes the manifest, then names the iteration (None: release) in the tracker, atomically.

    Call it on one rank, once everything else is on disk.
    """
    of_data = [] if iteration is None else data_files(folder, iteration)
    files = [*iteration_folder(folder, iteration).iterdir(), *of_data]
    manifest = {
        "iteration": iteration,
        "files": {
            os.path.relpath(p, folder): p.stat().st_size
            for p in sorted(files)
            if p.name != MANIFEST and p.suffix != ".partial"
        },
    }
    write_text(iteration_folder(folder, iteration) / MANIFEST, json.dumps(manifest, indent=1))
    write_text(Path(folder) / TRACKER, RELEASE if iteration is None else str(iteration))


def data_files(folder: str | Path, iteration: int) -> list[Path]:
    """What the data source and the rollout manager keep with this iteration's weights."""
    return list((Path(folder) / "rollout").glob(f"*[!0-9]{iteration}.pt"))


def check_manifest(start: Start) -> None:
    """Every file that the commit names is there in its size; the data's only where a run resumes.

    Raises CheckpointError naming the file. A checkpoint of another program has no manifest.
    """
    path = start.folder / MANIFEST
    if not path.is_file():
        return
    try:
        files = json.loads(path.read_text())["files"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). {_REMEDY}") from None
    for name, size in files.items():
        file = start.folder.parent / name
        if not start.resume and file.parent.name == "rollout":
            continue
        if file.parent.name != "rollout":
            file = start.folder / file.name  # the directory itself may have been renamed
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete. {_REMEDY}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, not {size}: it was cut off or "
                f"overwritten. {_REMEDY}"
            )


_REMEDY = "Copy the checkpoint again, or choose an earlier one with --ckpt-step."


def delete_old_checkpoints(folder: str | Path, keep_last: int | None) -> None:
    """Deletes iter_* directories beyond the `keep_last` newest (None: none). Call it on one rank.

    Call it after a commit: the directory that the tracker names is always among those kept, and
    iterations after it are not counted, nor touched. A directory that cannot be deleted is reported
    and left: the checkpoint just written is safe.
    """
    tracker = Path(folder) / TRACKER
    if keep_last is None or not tracker.is_file():
        return
    latest = tracker.read_text().strip()
    if not latest.isdigit():
        return
    found = {int(p.name.removeprefix("iter_")): p for p in Path(folder).glob("iter_*[0-9]")}
    for iteration in sorted(i for i in found if i <= int(latest))[:-keep_last]:
        doomed = Path(folder) / f".deleting_{found[iteration].name}"
        try:
            os.replace(found[iteration], doomed)  # at once: --ckpt-step never meets half of it
            shutil.rmtree(doomed)
            for path in data_files(folder, iteration):
                path.unlink()
        except OSError as error:
            logging.getLogger(__name__).warning(
                "--keep-last %d: cannot delete %s (%s)", keep_last, found[iteration], error
            )
