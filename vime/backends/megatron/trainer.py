"""The trainer of one rank: a plain class whose methods Ray calls.

Modules that import Megatron are imported inside functions here, because `initialize_parallel` must
patch Megatron first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vime import platform
from vime.addresses import LOOPBACK
from vime.backends.megatron.checkpoints.async_save import BackgroundSaves
from vime.backends.megatron.checkpoints.start import actor_start
from vime.backends.megatron.memory.in_use import MemoryUse, memory_remedy
from vime.backends.megatron.memory.offload import (
    Offload,
    free_cached_memory,
    gradients_of,
    optimizer_state_of,
    set_memory_limit,
    weights_of,
)
from vime.backends.megatron.parallel import initialize_parallel, shutdown_parallel
from vime.backends.megatron.training.report import training_speed
from vime.backends.megatron.weights.export import export_hf
from vime.backends.megatron.weights.folder import save_hf
from vime.backends.vllm.client import EngineClient
from vime.config import Config
from vime.config.view import ArgsView
from vime.data.train_batch import parts_of
from vime.plan.shape import shape_of
from vime.types import RankBatch, TrainBatch
from vime.weight_sync.sender import make_sender

log = logging.getLogger(__name__)


class MegatronTrainer:
    """Actor, critic and their memory on one of `world_size` ranks. Every method is a collective.

    host              this node's address, at which engines reach the rank
    start_rollout_id  the first rollout to train: the one after the checkpoint in --load, or 0
    """

    def __init__(
        self,
        cfg: Config,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        master_address: str = LOOPBACK,
        master_port: int = 0,
        store: dist.TCPStore | None = None,
        host: str = LOOPBACK,
    ) -> None:
        initialize_parallel(cfg, rank, world_size, local_rank, master_address, master_port, store)
        if init := cfg.algorithm.plugin("megatron_init_path"):
            init(ArgsView(cfg))
        from vime.backends.megatron.kernels.choice import chosen
        from vime.backends.megatron.training.actor import Actor
        from vime.backends.megatron.training.critic import Critic

        log.info("rank %d of %d is connected; kernels: %s", rank, world_size, chosen())
        self.cfg, self.rank, self.host = cfg, rank, host
        self.device = platform.current().device(local_rank)
        if self.device.type == "cuda":
            set_memory_limit(cfg.cluster.train_memory_margin_bytes)
        self.shape = shape_of(cfg)
        self.sender: Any = None
        self.gloo: Any = None
        self.offloaded = Offload()
        self.memory = MemoryUse()
        self.saves: BackgroundSaves | None = None

        start, asked = actor_start(cfg), cfg.batch.start_rollout_id
        self.start_rollout_id = start.rollout_id if asked is None else asked
        self.actor = Actor(cfg, start, self.start_rollout_id)
        self.critic = Critic(cfg, start, self.actor.chunks) if cfg.algorithm.needs_critic else None

    # -- training ----------------------------------------------------------------------------------

    @property
    def dp_rank(self) -> int:
        from megatron.core import parallel_state as mpu

        return mpu.get_data_parallel_rank()

    def train(self, batch: TrainBatch | RankBatch) -> dict[str, float]:
        """Takes every optimizer step of one rollout. Returns its metrics, equal on every rank.

        A rank reads its own sequences only, so its part of the batch is enough.
        A step whose loss or gradient is not finite changes nothing and counts in
        `train/skipped_steps`. Raises RuntimeError after MAX_SKIPPED_STEPS skipped steps in a row,
        and ConfigError, with the flags that help, if GPU memory runs out.
        """
        from vime.backends.megatron.training.one_rollout import OneRollout

        if isinstance(batch, TrainBatch):
            batch = parts_of(batch, self.cfg.dp)[self.dp_rank]
        self._wait_for_weights()
        self.memory.reset_peak()
        with memory_remedy(self.cfg, int(batch.lengths.max())):
            rollout = OneRollout(self.cfg, batch, self.actor, self.critic, self.device)
            metrics = rollout.train()
            self._wait_for_weights()
            self.actor.finish(batch, trained=rollout.trains_actor)
        if rollout.trains_actor:
            metrics |= training_speed(self.shape, batch, rollout.actor_train_s)
        return metrics | self.memory.metrics()

    # -- sharing a GPU -----------------------------------------------------------------------------

    def offload(self, keep_weights: bool) -> None:
        """Moves all state, or all but the actor's weights, off the GPU that engines share."""
        self._wait_for_weights()
        kept: list[Tensor] = []
        dropped: list[Tensor] = []
        for model in self._models():
            model.optimizer.zero_grad()
            kept += [*weights_of(model.chunks), *optimizer_state_of(model.optimizer)]
            dropped += gradients_of(model.chunks)
        staying = weights_of(self.actor.chunks) if keep_weights else ()
        self.offloaded.offload(kept, dropped=dropped, staying=staying)
        self.memory.record_kept()

    def free_cache(self) -> None:
        """Returns torch's cached memory to the GPU that engines share; all state stays."""
        free_cached_memory()
        self.memory.record_kept()

    def onload(self) -> None:
        """Moves the state back onto the GPU, which the trainer may fill up to the margin."""
        set_memory_limit(self.cfg.cluster.train_memory_margin_bytes)
        self.offloaded.onload()

    # -- weights -----------------------------------------------------------------------------------

    def connect_engines(self, urls: list[str]) -> None:
        """Prepares weight updates into these engines. Call it again if an engine is replaced."""
        if self.sender is not None:
            self.sender.close()
        timeout_s = self.cfg.engine.weight_transfer_timeout_s
        clients = [EngineClient(url, timeout_s=timeout_s, who="the trainer") for url in urls]
        self.sender = make_sender(
            self.cfg,
            clients,
            self.rank,
            device=self.device,
            group=self._gloo_group(),
            host=self.host,
        )
        self.sender.connect()

    def update_weights(self, version: int) -> dict[str, float]:
        """Sends the weights to every connected engine. Returns the time and bytes of rank 0."""
        if self.sender is None:
            raise RuntimeError("update_weights before connect_engines: no engine is known")
        self._wait_for_weights()
        report = self.sender.send(export_hf(self.actor.chunks, self.cfg), version)
        if self.actor.sent is not None:
            self.actor.sent.keep(version)
        return {
            "perf/update_weights_time": report.seconds,
            "perf/update_weights_bytes": float(report.bytes),
            **{f"perf/update_weights/{name}": s for name, s in report.phases.items()},
        }

    def _gloo_group(self) -> Any:
        """All ranks over gloo, when the default group uses NCCL.

        The other ranks may wait for as long as rank 0 waits for the engines.
        """
        if not platform.current().is_cuda:
            return None
        if self.gloo is None:
            timeout = timedelta(
                minutes=self.cfg.cluster.distributed_timeout_minutes,
                seconds=self.cfg.engine.weight_transfer_timeout_s,
            )
            self.gloo = dist.new_group(backend="gloo", timeout=timeout)
        return self.gloo

    # -- saving ------------------------------------------------------------------------------------

    def save(self, rollout_id: int) -> None:
        """Saves everything that a resumed run needs, as a checkpoint in --save.

        With --async-save this copies the state; a thread writes and commits it during training.
        """
        from vime.backends.megatron.checkpoints.save import save_checkpoint

        self._wait_for_weights()
        files, actor = self.cfg.checkpoint, self.actor
        if files.async_save and self.saves is None:
            self.saves = BackgroundSaves()
        save_checkpoint(
            self.cfg,
            files.save,
            rollout_id,
            actor.chunks,
            actor.optimizer if files.save_optim else None,
            actor.scheduler,
            {"rollout_id": rollout_id},
            critic=self.critic,
            background=self.saves,
        )

    def finish_saves(self) -> None:
        """Waits until the save in progress is committed. Raises CheckpointError if it failed."""
        if self.saves is not None:
            self.saves.finish()

    def save_hf(self, path: str) -> None:
        """Writes the weights as a complete Hugging Face folder."""
        self._wait_for_weights()
        save_hf(self.actor.chunks, self.cfg, path)

    def close(self) -> None:
        """Leaves the engines and the other ranks. Safe to call twice."""
        if self.sender is not None:
            self.sender.close()
            self.sender = None
        shutdown_parallel()

    # -- both models -------------------------------------------------------------------------------

    def _models(self) -> Iterator[Any]:
        """Actor and critic; each has `chunks` and an `optimizer`."""
        yield self.actor
        if self.critic is not None:
            yield self.critic

    def _wait_for_weights(self) -> None:
        """Completes the parameter gather that --overlap-param-gather leaves to the next pass."""
        if self.cfg.parallel.overlap_param_gather:
            for model in self._models():
                for chunk in model.chunks:
                    chunk.start_param_sync(force_sync=True)
