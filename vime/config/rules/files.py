"""Folders and files that a run reads must exist; folders that it writes must be possible."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vime.config import Config
from vime.config.hf_config import hf_config
from vime.config.sections.rollout import ENGINE_ROLLOUTS


def checkpoint_is_there(cfg: Config) -> Iterator[str]:
    folder = Path(cfg.model.hf_checkpoint)
    name = f"--hf-checkpoint {folder}"
    if not folder.is_dir():
        yield f"{name} is not a folder. Give the folder of a downloaded Hugging Face checkpoint."
    elif not (folder / "config.json").is_file():
        yield f"{name} holds no config.json. Give the folder of a complete checkpoint."
    elif not hf_config(cfg):
        yield f"{name}: its config.json is not a JSON object. Download the checkpoint again."


def reference_is_there(cfg: Config) -> Iterator[str]:
    """A missing --load means a new run; a missing --ref-load is a mistake."""
    folder = cfg.checkpoint.ref_load
    if folder is not None and not Path(folder).is_dir():
        yield (
            f"--ref-load {folder} is not a folder. Make it with tools/convert_hf_to_torch_dist.py, "
            "or leave --ref-load out to start from --hf-checkpoint."
        )


def teacher_is_there(cfg: Config) -> Iterator[str]:
    folder, a = cfg.checkpoint.opd_teacher_load, cfg.algorithm
    name = f"--opd-teacher-load {folder}"
    if folder is not None and not (a.use_opd and a.opd_type == "megatron"):
        kind = " --opd-type megatron" if a.use_opd else ""
        yield f"{name} has no effect without --use-opd{kind}. Add that, or leave it out."
    elif not a.use_opd:
        return
    elif a.opd_type == "vllm":
        yield from _served_teacher(cfg)
    elif folder is None:
        yield (
            "--use-opd needs a teacher. Add --opd-teacher-load FOLDER: a checkpoint or an HF "
            "folder of a model with the policy's architecture."
        )
    elif not Path(folder).is_dir():
        yield f"{name} is not a folder. Give a checkpoint or an HF folder."


def _served_teacher(cfg: Config) -> Iterator[str]:
    url, rollout = cfg.algorithm.opd_teacher_url, cfg.rollout
    by_hand = (
        cfg.reward.custom_rm_path,
        rollout.custom_generate_path,
        rollout.sample_hook_paths,
        rollout.sample_filter_path,
        rollout.all_samples_path,
        rollout.convert_path,
        rollout.data_postprocess_path,
        cfg.debug.load_rollout_data,
    )
    if url is None and rollout.function_path in ENGINE_ROLLOUTS and not any(by_hand):
        yield (
            "--opd-type vllm needs a teacher. Add --opd-teacher-url http://HOST:PORT of "
            "`vllm serve TEACHER`, or your own function that sets Sample.teacher_log_probs."
        )
    if url is not None and rollout.temperature != 1.0:
        yield (
            f"--opd-teacher-url {url} gives log-probabilities at temperature 1, and "
            f"--rollout-temperature {rollout.temperature} samples at another. Set the second to "
            "1, or use --opd-type megatron."
        )


def working_dir_is_there(cfg: Config) -> Iterator[str]:
    folder = cfg.cluster.working_dir
    if folder is not None and not Path(folder).is_dir():
        yield f"--working-dir {folder} is not a folder. Give the folder with your code."


def folders_can_be_made(cfg: Config) -> Iterator[str]:
    """Checks early; otherwise a run would end when it logs or saves for the first time."""
    if cfg.debug.dry_run:
        return
    for name, path in (
        ("--run-dir", cfg.log.run_dir),
        ("--save", cfg.checkpoint.save),
        ("--save-hf", cfg.checkpoint.save_hf),
    ):
        if path is None:
            continue
        there = Path(path).absolute()
        while not os.path.exists(
            there
        ):  # Path.exists raises an error in a folder that this user may not read
            there = there.parent
        if not (there.is_dir() and os.access(there, os.W_OK)):
            yield (
                f"{name} {path} cannot be made: {there} is not a folder that you may write to. "
                "Choose another folder."
            )


def converter_has_a_target(cfg: Config) -> Iterator[str]:
    if cfg.checkpoint.save is None:
        yield "--save is missing. Add --save FOLDER for the converted checkpoint."
