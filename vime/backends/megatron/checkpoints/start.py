"""Resolves where a run's weights come from, and whether the run continues there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vime.backends.megatron.checkpoints.commit import (
    RELEASE,
    TRACKER,
    check_manifest,
    committed,
    iteration_folder,
    iterations_in,
)
from vime.backends.megatron.hf.compare import check_hf_fits
from vime.backends.megatron.weights.files import HFFiles
from vime.config import Config
from vime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Start:
    """One folder of weights.

    folder     an HF folder, or one `iter_*` or `release` directory
    is_hf      whether `folder` is an HF folder
    iteration  the rollout after which it was saved; None for converted or HF weights
    resume     also load optimizer, scheduler and RNG, and continue at iteration + 1
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
    """Where the actor starts: --load if it holds a checkpoint, else --ref-load or --hf-checkpoint.

    Each may be a checkpoint folder or a plain HF folder. `ckpt_step` chooses an iteration of
    --load, or of --ref-load when --load is not given. Only an iteration in --load is resumed; every
    other start begins at rollout 0. Raises CheckpointError.
    """
    if load and (start := _in_folder(Path(load), "--load", ckpt_step)):
        return replace(start, resume=start.iteration is not None)
    if load and ckpt_step is not None:
        raise CheckpointError(
            f"--load {load} holds no checkpoint, but --ckpt-step asks for iteration {ckpt_step}. "
            "Leave one of them out."
        )
    if ref_load:
        return _weights_in(Path(ref_load), "--ref-load", ckpt_step)
    if hf_checkpoint:
        return Start(Path(hf_checkpoint), is_hf=True)
    raise CheckpointError("No weights to start from: give --hf-checkpoint, --ref-load or --load.")


def actor_start(cfg: Config) -> Start:
    """Where the policy starts. Raises CheckpointError."""
    files = cfg.checkpoint
    return resolve(files.load, files.ref_load, cfg.model.hf_checkpoint, files.ckpt_step)


def reference_start(cfg: Config) -> Start:
    """Where the weights of the KL terms' reference model are. Raises CheckpointError."""
    files = cfg.checkpoint
    return resolve(None, files.ref_load, cfg.model.hf_checkpoint, files.ref_ckpt_step)


def teacher_start(cfg: Config) -> Start:
    """Where the weights of --use-opd's teacher are. Raises CheckpointError."""
    return _weights_in(Path(cfg.checkpoint.opd_teacher_load), "--opd-teacher-load")


def check_start(cfg: Config) -> list[str]:
    """Problems of the folders that a trainer would load. No trainer needs to run for the check.

    A folder that does not exist is left to the rules `checkpoint_is_there`, `reference_is_there`
    and `teacher_is_there`.
    """
    files, hf = cfg.checkpoint, cfg.model.hf_checkpoint
    if cfg.debug.rollout_only or files.ref_load and not Path(files.ref_load).is_dir():
        return []
    if not (Path(hf) / "config.json").is_file():
        return []
    starts = [partial(actor_start, cfg)]
    if cfg.algorithm.needs_reference:
        starts.append(partial(reference_start, cfg))
    teacher = files.opd_teacher_load
    if cfg.algorithm.needs_teacher and teacher and Path(teacher).is_dir():
        starts.append(partial(teacher_start, cfg))
    problems = [problem for find in starts if (problem := _problem_of(cfg, find))]
    return list(dict.fromkeys(problems))


def _problem_of(cfg: Config, find: Callable[[], Start]) -> str | None:
    try:
        start = find()
        if not start.is_hf:
            check_manifest(start.folder, with_data=start.resume)
            return None
    except CheckpointError as error:
        return str(error)
    try:
        check_hf_fits(cfg, start.folder)
        if not cfg.debug.dry_run:  # a plan needs no weights
            HFFiles(start.folder, framework="np")
    except CheckpointError as error:
        return f"{_flag_of(cfg, start.folder)} {start.folder}: {error}"
    return None


def _flag_of(cfg: Config, folder: Path) -> str:
    files = cfg.checkpoint
    given = {
        "--load": files.load,
        "--ref-load": files.ref_load,
        "--hf-checkpoint": cfg.model.hf_checkpoint,
        "--opd-teacher-load": files.opd_teacher_load,
    }
    return next(flag for flag, path in given.items() if path and Path(path) == folder)


def _weights_in(folder: Path, flag: str, step: int | None = None) -> Start:
    start = _in_folder(folder, flag, step)
    if start is None:
        raise CheckpointError(
            f"{flag} {folder} holds neither a checkpoint ({TRACKER}) nor an HF model "
            "(config.json). Make a checkpoint with tools/convert_hf_to_torch_dist.py, or leave the "
            "flag out."
        )
    return start


def _in_folder(folder: Path, flag: str, step: int | None) -> Start | None:
    latest = committed(folder)
    if latest is not None:
        iteration = step if step is not None else None if latest == RELEASE else int(latest)
        found = iteration_folder(folder, iteration)
        if not found.is_dir():
            named = "--ckpt-step" if step is not None else str(folder / TRACKER)
            present = sorted(p.name for p in iterations_in(folder).values())
            raise CheckpointError(
                f"{flag} {folder}: {named} names {found.name}, which does not exist. "
                f"Present: {', '.join(present) or 'none'}."
            )
        return Start(found, is_hf=False, iteration=iteration)
    if step is not None and folder.is_dir():
        raise CheckpointError(
            f"{flag} {folder} has no {TRACKER}, so iteration {step} cannot be chosen from it."
        )
    if (folder / "config.json").is_file():
        return Start(folder, is_hf=True)
    if (folder / "metadata.json").is_file():  # the flag names one iter_* directory
        return Start(folder, is_hf=False)
    return None
