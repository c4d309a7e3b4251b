"""Loads a checkpoint, in Megatron's format or an HF folder, into a model in any layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch import nn

from vime.backends.megatron.checkpoints import torch_dist
from vime.backends.megatron.checkpoints.agreement import agreed, named
from vime.backends.megatron.checkpoints.commit import DAMAGED, check_manifest
from vime.backends.megatron.checkpoints.contents import ENTRY, Contents, current_layout, freezing
from vime.backends.megatron.checkpoints.rng import restore_rng_state, sharded_rng_state
from vime.backends.megatron.checkpoints.start import Start
from vime.backends.megatron.checkpoints.state import CRITIC, critic_state, fill, sharded_state
from vime.backends.megatron.hf.compare import check_architecture_fits
from vime.backends.megatron.hf.registry import described_by
from vime.backends.megatron.weights.load import load_hf_weights
from vime.config import Config
from vime.errors import CheckpointError


def load_checkpoint(
    cfg: Config,
    start: Start,
    chunks: Sequence[nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Fills the chunks, and under `start.resume` optimizer, scheduler and RNG. A collective.

    The layout may differ from the saving run's; the RNG states then stay as seeded. Without
    `resume` a given optimizer takes the loaded weights as its main copy. Returns the saved `extra`.
    Raises CheckpointError on every rank, naming file and remedy.
    """
    if start.is_hf:
        with agreed(f"{start.folder}: cannot load"):
            load_hf_weights(chunks, start.folder, cfg)
        if optimizer is not None:
            optimizer.reload_model_params()
        return {}
    with agreed(f"{start.folder}: cannot load"):
        torch_dist.check_files(start.folder)
        check_manifest(start.folder, with_data=start.resume)
    common = _common_state(start.folder)
    if ENTRY in common and not cfg.model.override:  # other programs may name arguments differently
        _check_architecture(cfg, common, start.folder)
    saved, frozen = Contents.of(common), freezing(cfg)
    resumes_optimizer = start.resume and cfg.checkpoint.load_optim and saved.optimizer
    resumed = (
        chunks,
        optimizer if resumes_optimizer else None,
        scheduler if start.resume and saved.scheduler else None,
    )
    with_rng = start.resume and saved.rng and saved.layout == current_layout()
    if optimizer is not None and resumes_optimizer:
        _check_freezing(saved.frozen, frozen, start.folder)
    with named(
        f"{start.folder}: cannot load the checkpoint. If its model differs from --hf-checkpoint's "
        f"config.json, correct the flags. If it is damaged: {DAMAGED}"
    ):
        wanted = sharded_state(*resumed, loading=True, freezes=bool(frozen))
        if with_rng:
            wanted["rng_state"] = sharded_rng_state()
        state = torch_dist.load(wanted, start.folder)
        fill(state, *resumed)
        if optimizer is not None and not resumes_optimizer:
            optimizer.reload_model_params()
        if with_rng:
            restore_rng_state(state["rng_state"])
    return json.loads(saved.extra)


def load_critic(cfg: Config, start: Start, critic: Any) -> bool:
    """Fills a `Critic` when the run resumes and the checkpoint holds a critic. A collective.

    Returns whether the critic was filled. Raises CheckpointError on every rank.
    """
    if not start.resume or start.is_hf:
        return False
    saved = Contents.of(_common_state(start.folder))
    if not saved.critic:
        return False
    resumes_optimizer = cfg.checkpoint.load_optim and saved.optimizer
    with named(f"{start.folder}: cannot load the critic. {DAMAGED}"):
        wanted = critic_state(critic, with_optimizer=resumes_optimizer, loading=True)
        state = torch_dist.load({CRITIC: wanted}, start.folder)[CRITIC]
        optimizer = critic.optimizer if resumes_optimizer else None
        fill(state, critic.chunks, optimizer, critic.scheduler)
        if not resumes_optimizer:
            critic.optimizer.reload_model_params()
    return True


def _common_state(folder: Path) -> dict[str, Any]:
    with agreed(f"{folder / 'common.pt'} is damaged"):
        return dist_checkpointing.load_common_state_dict(str(folder))


def _check_architecture(cfg: Config, common: dict[str, Any], folder: Path) -> None:
    expected = described_by(cfg.model.hf_checkpoint)
    try:
        check_architecture_fits(cfg, vars(common["args"]), expected)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _check_freezing(saved: str | None, here: str, folder: Path) -> None:
    if saved not in (None, here):
        raise CheckpointError(
            f"{folder}: its optimizer trained with {saved or 'no weight frozen'}, "
            f"this run has {here or 'no weight frozen'}. Give the same flag, or --no-load-optim "
            "to begin with a fresh optimizer."
        )
