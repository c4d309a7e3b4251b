"""Megatron's `torch_dist` checkpoints: saved from and loaded into any layout.

    FOLDER/iter_0000019/                        one directory per saved rollout
    FOLDER/iter_0000019/manifest.json           every file of the commit in bytes, the data's too
    FOLDER/rollout/*_19.pt                      data cursor and buffer; a rollout generated ahead
    FOLDER/release/                             converted weights, no training state
    FOLDER/latest_checkpointed_iteration.txt    "19" or "release"; written last: the commit point

A directory that the tracker does not name is unfinished or old, and a crash while saving leaves the
previous checkpoint in force.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from vime.backends.megatron import compat
from vime.backends.megatron.checkpoints.async_save import BackgroundSaves
from vime.backends.megatron.checkpoints.start import (
    MANIFEST,
    RELEASE,
    TRACKER,
    Start,
    check_manifest,
    commit_checkpoint,
    delete_old_checkpoints,
    iteration_folder,
    resolve,
)
from vime.backends.megatron.hf import described_by, load_hf_weights, model_args
from vime.backends.megatron.hf.check import check_architecture_fits
from vime.config import Config
from vime.errors import CheckpointError

__all__ = [
    "RELEASE",
    "TRACKER",
    "Start",
    "commit_checkpoint",
    "iteration_folder",
    "load_checkpoint",
    "resolve",
    "save_checkpoint",
]

_CRITIC = "critic"  # its entry; every key of its tensors has this in front
_STATE = "vime"  # our own entry of the common state: layout and the caller's extra values


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
    """Writes everything that continuing needs, then (with `commit`) the tracker. A collective.

    iteration  the rollout just trained; None writes `release/`: weights alone
    optimizer  left out when None (--no-save-optim)
    critic     a `Critic`, saved beside the actor; its optimizer as the actor's
    extra      JSON-able values that `load_checkpoint` gives back; the same on every rank
    background copies the state, returns, and writes and commits while training goes on
    fill       called with each tensor, or part of one, right before it is written
    Returns the directory. Raises CheckpointError when it cannot be written; the previous checkpoint
    then stays in force.
    """
    from vime.backends.megatron.checkpoints import torch_dist

    if background is not None:
        background.finish()  # one at a time: the newest commit is the newest checkpoint
    target = iteration_folder(folder, iteration)
    refused = (
        f"{target}: cannot write the checkpoint; the one before it stays in force. "
        "Free the disk or change --save"
    )
    with _agreed(refused):
        if dist.get_rank() == 0:
            target.mkdir(parents=True, exist_ok=True)
            (target / MANIFEST).unlink(missing_ok=True)  # of an earlier attempt
    with _named(refused):
        with_rng = iteration is not None
        frozen = _frozen(cfg)
        state = _sharded_state(
            chunks, optimizer, scheduler, with_rng=with_rng, loading=False, has_holes=bool(frozen)
        )
        if critic is not None:
            state[_CRITIC] = _critic_state(critic, optimizer is not None, loading=False)
        state |= {
            "args": Namespace(**_arguments(cfg)),
            "checkpoint_version": 3.0,
            "iteration": iteration or 0,
            _STATE: {
                "layout": _layout(),
                "optimizer": optimizer is not None,
                "scheduler": scheduler is not None,
                "rng": with_rng,
                "critic": critic is not None,
                "frozen": frozen,
                "extra": json.dumps(extra or {}),
            },
        }
        if background is not None:
            write = torch_dist.stage(state, target)
        else:
            torch_dist.save(state, target, fill)

    def finish() -> None:
        if commit:
            commit_checkpoint(folder, iteration)
            delete_old_checkpoints(folder, cfg.checkpoint.keep_last)

    if background is not None:
        background.begin(write, finish, refused)
        return target
    with _agreed(f"{target}: cannot commit the checkpoint"):
        if dist.get_rank() == 0:
            finish()
    return target


def load_checkpoint(
    cfg: Config,
    start: Start,
    chunks: Sequence[nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Fills the chunks, and under `start.resume` optimizer, scheduler and RNG. A collective.

    The layout may differ from the one that saved; RNG states are then left as seeded. Without
    `resume` an optimizer given here takes the loaded weights as its main copy. Returns the `extra`
    that was saved. Raises CheckpointError on every rank, naming file and remedy.
    """
    if start.is_hf:
        with _agreed(f"{start.folder}: cannot load"):
            load_hf_weights(chunks, start.folder, cfg)
        if optimizer is not None:
            optimizer.reload_model_params()
        return {}
    from megatron.core import dist_checkpointing

    from vime.backends.megatron.checkpoints import torch_dist

    with _agreed(f"{start.folder}: cannot load"):
        torch_dist.check_files(start.folder)
        check_manifest(start)
    with _agreed(f"{start.folder / 'common.pt'} is damaged"):
        common = dist_checkpointing.load_common_state_dict(str(start.folder))
    saved = common.get(_STATE, {"optimizer": "optimizer" in common})
    if _STATE in common and not cfg.model.override:  # another program's may spell things otherwise
        _check_architecture(cfg, common, start.folder)
    if not start.resume:
        optimizer_to_load = scheduler = None
    else:
        optimizer_to_load = optimizer if cfg.checkpoint.load_optim and saved["optimizer"] else None
        scheduler = scheduler if saved.get("scheduler") else None
    with_rng = start.resume and saved.get("rng", False) and saved.get("layout") == _layout()
    frozen = _frozen(cfg)
    if optimizer_to_load is not None and saved.get("frozen", frozen) != frozen:
        raise CheckpointError(
            f"{start.folder}: its optimizer trained with {saved['frozen'] or 'no weight frozen'}, "
            f"this run has {frozen or 'no weight frozen'}. Give the same, or --no-load-optim to "
            "begin with a fresh optimizer."
        )
    with _named(
        f"{start.folder}: cannot load the checkpoint. If its model differs from --hf-checkpoint's "
        "config.json, correct the flags; if it is damaged, choose another with --ckpt-step"
    ):
        wanted = _sharded_state(
            chunks,
            optimizer_to_load,
            scheduler,
            with_rng=with_rng,
            loading=True,
            has_holes=bool(frozen),
        )
        state = torch_dist.load(wanted, start.folder)
        for key, chunk in _keyed(chunks):
            chunk.load_state_dict(state[key])
        if optimizer_to_load is not None:
            optimizer_to_load.load_state_dict(state["optimizer"])
            compat.forget_counters(optimizer_to_load)
            compat.allocate_optimizer_state(optimizer_to_load)
        elif optimizer is not None:
            optimizer.reload_model_params()
        if scheduler is not None:
            scheduler.num_steps = 0  # Megatron adds the saved ones to it
            scheduler.load_state_dict(state["opt_param_scheduler"])
        if with_rng:
            from vime.backends.megatron.checkpoints.rng import restore_rng_state

            restore_rng_state(state["rng_state"])
    return json.loads(saved.get("extra", "{}"))


def _check_architecture(cfg: Config, common: dict[str, Any], folder: Path) -> None:
    expected = described_by(cfg.model.hf_checkpoint)
    try:
        check_architecture_fits(cfg, vars(common["args"]), expected)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def load_critic(cfg: Config, start: Start, critic: Any) -> bool:
    """Fills a `Critic` from a checkpoint that resumes and has one. A collective.

    Otherwise it stays as it is and the answer is False. Raises CheckpointError on every rank.
    """
    if not start.resume or start.is_hf:
        return False
    from megatron.core import dist_checkpointing

    from vime.backends.megatron.checkpoints import torch_dist

    with _agreed(f"{start.folder / 'common.pt'} is damaged"):
        common = dist_checkpointing.load_common_state_dict(str(start.folder))
    saved = common.get(_STATE, {})
    if not saved.get("critic"):
        return False
    with_optimizer = cfg.checkpoint.load_optim and saved["optimizer"]
    with _named(f"{start.folder}: cannot load the critic; choose another with --ckpt-step"):
        wanted = {_CRITIC: _critic_state(critic, with_optimizer, loading=True)}
        state = torch_dist.load(wanted, start.folder)[_CRITIC]
        for key, chunk in _keyed(critic.chunks):
            chunk.load_state_dict(state[key])
        if with_optimizer:
            critic.optimizer.load_state_dict(state["optimizer"])
            compat.allocate_optimizer_state(critic.optimizer)
        else:
            critic.optimizer.reload_model_params()
        critic.scheduler.num_steps = 0  # Megatron adds the saved ones to it
        critic.scheduler.load_state_dict(state["opt_param_scheduler"])
    return True


def _critic_state(critic: Any, with_optimizer: bool, *, loading: bool) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    optimizer = critic.optimizer if with_optimizer else None
    state = _sharded_state(
        critic.chunks, optimizer, critic.scheduler, with_rng=False, loading=loading
    )
    add_prefix_for_sharding(state, f"{_CRITIC}.")
    return state


def _keyed(chunks: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Megatron's names: "model", or "model0", "model1" ... under virtual pipelining."""
    from vime.backends.megatron.chunks import unwrap

    if len(chunks) == 1:
        return [("model", unwrap(chunks[0]))]
    return [(f"model{i}", unwrap(chunk)) for i, chunk in enumerate(chunks)]


def _frozen(cfg: Config) -> str:
    """The flag that chooses which weights train, as given; empty: all do."""
    o = cfg.optimizer
    given = {
        "--freeze-params-name-list": o.freeze_names,
        "--only-train-params-name-list": o.train_names,
    }
    return "".join(f"{flag} {' '.join(names)}" for flag, names in given.items() if names)


def _sharded_state(
    chunks: Sequence[nn.Module],
    optimizer: Any,
    scheduler: Any,
    *,
    with_rng: bool,
    loading: bool,
    has_holes: bool = False,
) -> dict[str, Any]:
    """
    has_holes  some weights do not train. Megatron stacks a model's layers, and a layer's experts,
               into one tensor a kind, of which a file must hold every part; the optimizer has none
               of frozen weights, so that its state is then named layer by layer
    """
    state: dict[str, Any] = {key: chunk.sharded_state_dict() for key, chunk in _keyed(chunks)}
    if optimizer is not None:
        compat.allocate_optimizer_state(optimizer)
        weights = dict(state)
        if has_holes:
            alone = {"singleton_local_shards": True}
            weights = {k: c.sharded_state_dict(metadata=alone) for k, c in _keyed(chunks)}
        with compat.every_rank_counts(optimizer) if has_holes else nullcontext():
            state["optimizer"] = optimizer.sharded_state_dict(
                weights,
                is_loading=loading,
                metadata={
                    "distrib_optim_sharding_type": "fully_reshardable",  # reshards TP and PP too
                    "chained_optim_avoid_prefix": True,
                },
            )
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    if with_rng:
        from vime.backends.megatron.checkpoints.rng import sharded_rng_state

        state["rng_state"] = sharded_rng_state()
    return state


def _layout() -> dict[str, int]:
    from megatron.core import parallel_state as mpu

    return {
        "world": dist.get_world_size(),
        "tp": mpu.get_tensor_model_parallel_world_size(),
        "pp": mpu.get_pipeline_model_parallel_world_size(),
        "cp": mpu.get_context_parallel_world_size(),
        "ep": mpu.get_expert_model_parallel_world_size(),
    }


def _arguments(cfg: Config) -> dict[str, Any]:
    """What Megatron's own tools read from a checkpoint: architecture and layout."""
    p = cfg.parallel
    return model_args(cfg) | {
        "tensor_model_parallel_size": p.tp,
        "pipeline_model_parallel_size": p.pp,
        "context_parallel_size": p.cp,
        "expert_model_parallel_size": p.ep,
        "expert_tensor_parallel_size": p.etp,
        "use_distributed_optimizer": p.use_distributed_optimizer,
        "ckpt_format": "torch_dist",
    }


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Any failure inside as a CheckpointError that begins with `what`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


@contextmanager
def _agreed(what: str) -> Iterator[None]:
    """The same, on every rank when it happens on one. The body must hold no collective."""
    problem = None
    try:
        with _named(what):
            yield
    except CheckpointError as error:
        problem = error
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, None if problem is None else str(problem))
    if problem is not None:
        raise problem
    if first := next((p for p in problems if p), None):
        raise CheckpointError(first)
