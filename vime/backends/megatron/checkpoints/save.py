"""Saves a checkpoint in Megatron's `torch_dist` format."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from vime.backends.megatron.checkpoints import torch_dist
from vime.backends.megatron.checkpoints.agreement import agreed, named
from vime.backends.megatron.checkpoints.async_save import BackgroundSaves
from vime.backends.megatron.checkpoints.commit import (
    begin_save,
    commit_checkpoint,
    iteration_folder,
)
from vime.backends.megatron.checkpoints.contents import Contents, current_layout, freezing
from vime.backends.megatron.checkpoints.retention import delete_old_checkpoints
from vime.backends.megatron.checkpoints.rng import sharded_rng_state
from vime.backends.megatron.checkpoints.state import CRITIC, critic_state, sharded_state
from vime.backends.megatron.hf.registry import model_args
from vime.config import Config

_NOT_SHARED = "The previous checkpoint stays in force. All nodes that train must share --save."


def save_checkpoint(
    cfg: Config,
    folder: str | Path,
    iteration: int | None,
    chunks: Sequence[nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    extra: dict[str, Any] | None = None,
    *,
    critic: Any = None,
    commit: bool = True,
    background: BackgroundSaves | None = None,
    fill: Callable[[Tensor], None] | None = None,
) -> Path:
    """Writes all state that a resumed run needs, then (with `commit`) the tracker. A collective.

    iteration   the rollout just trained; None writes weights only, to `release/`
    optimizer   None leaves its state out (--no-save-optim), and the critic's
    extra       JSON-able values that `load_checkpoint` returns; the same on every rank
    critic      a `Critic` to save beside the actor
    background  copies the state and returns; writes and commits while training continues
    fill        called with each tensor, or part of a tensor, right before it is written
    Returns the directory. Raises CheckpointError when writing fails; the previous checkpoint then
    stays in force.
    """
    if background is not None:
        background.finish()  # one save at a time, so that commits keep their order
    target = iteration_folder(folder, iteration)
    refused = (
        f"{target}: cannot write the checkpoint; the previous one stays in force. "
        "Free the disk or change --save"
    )
    with agreed(refused):
        if dist.get_rank() == 0:
            begin_save(folder, iteration)
    with named(refused):
        state = _state(cfg, iteration, chunks, optimizer, scheduler, critic, extra or {})
        if background is not None:
            write = torch_dist.stage(state, target)
        else:
            torch_dist.save(state, target, fill)

    def finish() -> None:
        if commit:
            torch_dist.check_files(target, _NOT_SHARED)
            commit_checkpoint(folder, iteration)
            delete_old_checkpoints(folder, cfg.checkpoint.keep_last)

    if background is not None:
        background.begin(write, finish, refused)
        return target
    with agreed(f"{target}: cannot commit the checkpoint"):
        if dist.get_rank() == 0:
            finish()
    return target


def _state(
    cfg: Config,
    iteration: int | None,
    chunks: Sequence[nn.Module],
    optimizer: Any,
    scheduler: Any,
    critic: Any,
    extra: dict[str, Any],
) -> dict[str, Any]:
    with_optimizer, with_rng = optimizer is not None, iteration is not None
    frozen = freezing(cfg)
    state = sharded_state(chunks, optimizer, scheduler, loading=False, freezes=bool(frozen))
    if with_rng:
        state["rng_state"] = sharded_rng_state()
    if critic is not None:
        state[CRITIC] = critic_state(critic, with_optimizer=with_optimizer, loading=False)
    contents = Contents(
        optimizer=with_optimizer,
        scheduler=scheduler is not None,
        rng=with_rng,
        critic=critic is not None,
        layout=current_layout(),
        frozen=frozen,
        extra=json.dumps(extra),
    )
    return state | contents.entry() | _for_megatron(cfg, iteration)


def _for_megatron(cfg: Config, iteration: int | None) -> dict[str, Any]:
    """Entries that Megatron's own tools read: architecture, layout and iteration."""
    p = cfg.parallel
    args = model_args(cfg) | {
        "tensor_model_parallel_size": p.tp,
        "pipeline_model_parallel_size": p.pp,
        "context_parallel_size": p.cp,
        "expert_model_parallel_size": p.ep,
        "expert_tensor_parallel_size": p.etp,
        "use_distributed_optimizer": p.use_distributed_optimizer,
        "ckpt_format": "torch_dist",
    }
    return {
        "args": Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": iteration or 0,
    }
