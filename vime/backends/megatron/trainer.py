"""The trainer of one rank, a plain class that Ray wraps: a rollout's passes, sharing, saving."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vime import platform
from vime.backends.megatron.checkpoints.async_save import BackgroundSaves
from vime.backends.megatron.checkpoints.start import actor_start
from vime.backends.megatron.memory.in_use import MemoryUse, memory_remedy
from vime.backends.megatron.memory.offload import (
    Offload,
    give_back,
    gradients_of,
    leave_free,
    optimizer_state_of,
    weights_of,
)
from vime.backends.megatron.parallel import initialize_parallel, shutdown_parallel
from vime.backends.megatron.training.report import Clock, mean_of_steps, samples_of
from vime.config import Config
from vime.config.view import ArgsView
from vime.plan.memory import shape_of
from vime.types import TrainBatch

log = logging.getLogger(__name__)


class MegatronTrainer:
    """Model, optimizer and loss on one of `world_size` ranks. Every method is a collective.

    start_rollout_id  the first rollout to train: after the checkpoint in --load, or 0
    """

    def __init__(
        self,
        cfg: Config,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        master_address: str = "127.0.0.1",
        master_port: int = 0,
    ) -> None:
        initialize_parallel(cfg, rank, world_size, local_rank, master_address, master_port)
        if init := cfg.algorithm.plugin("megatron_init_path"):
            init(ArgsView(cfg))
        # Megatron can be imported only now: the patches come first.
        from vime.backends.megatron.kernels import chosen
        from vime.backends.megatron.training.actor import Actor
        from vime.backends.megatron.training.critic import Critic

        log.info("rank %d of %d is connected; kernels: %s", rank, world_size, chosen())
        self.cfg, self.rank = cfg, rank
        self.device = platform.current().device(local_rank)
        if self.device.type == "cuda":
            leave_free(cfg.cluster.train_memory_margin_bytes)
        self.shape = shape_of(cfg)
        self.sender: Any = None
        self.away = Offload()
        self.memory = MemoryUse()
        self.saves: BackgroundSaves | None = None

        start, asked = actor_start(cfg), cfg.batch.start_rollout_id
        self.start_rollout_id = start.rollout_id if asked is None else asked
        self.actor = Actor(cfg, start, self.start_rollout_id)
        self.critic = Critic(cfg, start, self.actor.chunks) if cfg.algorithm.needs_critic else None

    # -- training ----------------------------------------------------------------------------------

    def train(self, batch: TrainBatch) -> dict[str, float]:
        """Every optimizer step of one rollout. Returns its metrics, the same on every rank.

        Raises RuntimeError when MAX_SKIPPED_STEPS steps in a row had a loss or gradient that is not
        finite; such a step changes nothing and is counted in `train/skipped_steps`. ConfigError
        when GPU memory runs out, with the flags that help.
        """
        longest = max(s.length for s in batch.sequences)
        self.memory.starts()
        with memory_remedy(self.cfg, longest):
            return self._train(batch) | self.memory.metrics()

    def _train(self, batch: TrainBatch) -> dict[str, float]:
        from vime.backends.megatron.training.actor import forward_plans, where_in
        from vime.backends.megatron.training.rollout_columns import RolloutColumns

        clock, actor, critic = Clock(), self.actor, self.critic
        self._wait_for_weights()
        on_policy = False
        columns = RolloutColumns(batch, self.cfg, self.device)
        critic_only = self.cfg.algorithm.num_critic_only_steps if critic is not None else 0
        trains_actor = batch.rollout_id >= critic_only
        if not actor.is_sft:
            with clock.timed("perf/log_probs_time"):
                on_policy = actor.old_logps(batch, columns, trains=trains_actor)
            if actor.reference is not None:
                with clock.timed("perf/ref_log_probs_time"):
                    columns.ref_logp_N = actor.logps_of(actor.reference, batch, columns, "ref_")
            if actor.teacher is not None:
                with clock.timed("perf/teacher_log_probs_time"):
                    columns.teacher_logp_N = actor.logps_of(
                        actor.teacher, batch, columns, "teacher_"
                    )
            if critic is not None:
                with clock.timed("perf/values_time"):
                    columns.value_N = critic.values(columns, forward_plans(batch))
            columns.set_advantages(self.cfg.algorithm, self.actor.args)
        steps = []
        with clock.timed("perf/actor_train_time"):
            for step_id in range(len(batch.steps) if trains_actor else 0):
                steps.append(actor.step(batch, columns, step_id, on_policy=on_policy))
        if critic is not None:
            with clock.timed("perf/critic_train_time"):
                for step_id, plan in enumerate(batch.steps):
                    samples = partial(samples_of, batch, plan)
                    steps.append(critic.step(columns, plan, where_in(batch, step_id), samples))
        self._wait_for_weights()
        actor.finish(batch, trained=trains_actor)
        metrics = {**mean_of_steps(steps), **clock.seconds}
        if not actor.is_sft:
            metrics |= columns.metrics()
        if not trains_actor:
            return metrics
        return metrics | self._speed(batch, clock.seconds["perf/actor_train_time"])

    def _speed(self, batch: TrainBatch, seconds: float) -> dict[str, float]:
        lengths = [s.length for s in batch.sequences]
        metrics = {"perf/actor_train_tok_per_s": sum(lengths) / seconds}
        if self.shape is not None:
            rate = self.shape.training_flops(lengths) / seconds / dist.get_world_size()
            metrics["perf/actor_train_tflops"] = rate / 1e12  # of one GPU
        return metrics

    def _wait_for_weights(self) -> None:
        """With --overlap-param-gather weights arrive during the next forward pass; not later."""
        if self.cfg.parallel.overlap_param_gather:
            for model in self._models():
                for chunk in model.chunks:
                    chunk.start_param_sync(force_sync=True)

    def _models(self) -> Iterator[Any]:
        """Actor and critic: what has `chunks` and an `optimizer`."""
        yield self.actor
        if self.critic is not None:
            yield self.critic

    # -- sharing a GPU -----------------------------------------------------------------------------

    def offload(self, keep_weights: bool) -> None:
        """Makes room for engines on the same GPU: all state, or all but the actor's weights."""
        self._wait_for_weights()
        leaving: list[Tensor] = []
        dropped: list[Tensor] = []
        for model in self._models():
            model.optimizer.zero_grad()
            leaving += [*weights_of(model.chunks), *optimizer_state_of(model.optimizer)]
            dropped += gradients_of(model.chunks)
        if keep_weights:
            stay = {w.untyped_storage()._cdata for w in weights_of(self.actor.chunks)}
            leaving = [t for t in leaving if t.untyped_storage()._cdata not in stay]
        self.away.leave(leaving, dropped=dropped)
        self.memory.left()

    def free_cache(self) -> None:
        """Makes room without moving state: gives back what torch keeps for later allocations."""
        give_back()
        self.memory.left()

    def onload(self) -> None:
        """Takes the GPU back, up to --train-memory-margin-bytes."""
        leave_free(self.cfg.cluster.train_memory_margin_bytes)
        self.away.come_back()

    # -- weights -----------------------------------------------------------------------------------

    def connect_engines(self, urls: list[str]) -> None:
        """Prepares weight updates into these engines, also after one of them was replaced."""
        from vime.backends.vllm.client import EngineClient
        from vime.weight_sync.sender import make_sender

        if self.sender is not None:
            self.sender.close()
        timeout_s = self.cfg.engine.weight_transfer_timeout_s
        self.sender = make_sender(
            self.cfg,
            [EngineClient(url, timeout_s=timeout_s, who="the trainer") for url in urls],
            self.rank,
            device=self.device,
            group=self._gloo_group(),
        )
        self.sender.connect()

    def update_weights(self, version: int) -> dict[str, float]:
        """Puts the weights into every connected engine. Rank 0 says what it took."""
        from vime.backends.megatron.weights.export import export_hf

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

    def save(self, rollout_id: int) -> None:
        """A checkpoint of everything that continuing needs, under --save.

        With --async-save it is copied here, and written and committed while training goes on.
        """
        from vime.backends.megatron.checkpoints.save import save_checkpoint

        self._wait_for_weights()
        files, actor = self.cfg.checkpoint, self.actor
        optimizer = actor.optimizer if files.save_optim else None
        extra = {"rollout_id": rollout_id}
        if files.async_save and self.saves is None:
            self.saves = BackgroundSaves()
        state = (actor.chunks, optimizer, actor.scheduler, extra)
        save_checkpoint(
            self.cfg, files.save, rollout_id, *state, critic=self.critic, background=self.saves
        )

    def finish_saves(self) -> None:
        """Waits until the checkpoint under way is committed. CheckpointError if it failed."""
        if self.saves is not None:
            self.saves.finish()

    def save_hf(self, path: str) -> None:
        """The weights as a Hugging Face folder that stands alone."""
        from vime.backends.megatron.weights.folder import save_hf

        self._wait_for_weights()
        save_hf(self.actor.chunks, self.cfg, path)

    def close(self) -> None:
        """Leaves engines and the other ranks. Safe to call twice."""
        if self.sender is not None:
            self.sender.close()
            self.sender = None
        shutdown_parallel()

    def _gloo_group(self) -> Any:
        """All ranks over gloo, where the default group is NCCL's."""
        if not platform.current().is_cuda:
            return None
        if not hasattr(self, "_gloo"):
            self._gloo = dist.new_group(backend="gloo")
        return self._gloo
