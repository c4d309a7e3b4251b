"""The trainer of one rank: a plain class that Ray wraps and that a test builds directly."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vime import platform
from vime.algorithms.hooks import TrainingHooks
from vime.backends.megatron.async_save import BackgroundSaves
from vime.backends.megatron.losses import objective_of
from vime.backends.megatron.memory import memory_remedy
from vime.backends.megatron.offload import (
    Offload,
    gradients_of,
    leave_free,
    optimizer_state_of,
    weights_of,
)
from vime.backends.megatron.parallel import initialize_parallel, shutdown_parallel
from vime.backends.megatron.reference import SentWeights, WeightCopy
from vime.backends.megatron.report import Clock, mean_of_steps, samples_of
from vime.backends.megatron.update import Updates
from vime.config import Config
from vime.config.memory import shape_of
from vime.errors import ConfigError
from vime.types import StepPlan, TrainBatch

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
        *,
        hooks: TrainingHooks | None = None,
    ) -> None:
        initialize_parallel(cfg, rank, world_size, local_rank, master_address, master_port)
        self.hooks = hooks or TrainingHooks()
        if self.hooks.init is not None:
            self.hooks.init(self.hooks.args)
        # Megatron can be imported only now: the patches come first.
        from megatron.core import parallel_state as mpu

        from vime.backends.megatron.checkpoint import load_checkpoint, resolve
        from vime.backends.megatron.kernels import chosen
        from vime.backends.megatron.model import build_model
        from vime.backends.megatron.optimizer import (
            apply_flags_again,
            build_optimizer,
            wrap_for_training,
        )

        log.info("rank %d of %d is connected; kernels: %s", rank, world_size, chosen())
        self.cfg, self.rank = cfg, rank
        self.device = platform.current().device(local_rank)
        if self.device.type == "cuda":
            leave_free(cfg.cluster.train_memory_margin_bytes)
        self.shape = shape_of(cfg)
        self.temperature = cfg.rollout.temperature or 1.0
        if cfg.algorithm.loss_type == "sft_loss":
            self.temperature = 1.0
        self.mpu = mpu
        self.sender: Any = None
        self.away = Offload()
        self.saves: BackgroundSaves | None = None

        files, hf = cfg.checkpoint, cfg.model.hf_checkpoint
        start = resolve(files.load, files.ref_load, hf, files.ckpt_step)
        provider = self.hooks.model and partial(self.hooks.model, self.hooks.args)
        self.chunks = wrap_for_training(cfg, build_model(cfg, provider=provider))
        log.info("the model is built; weights come from %s", start.folder)
        self.reference: WeightCopy | None = None
        reference = None
        if cfg.algorithm.needs_reference:
            reference = resolve(None, files.ref_load, hf, files.ref_ckpt_step)
            if reference != start:
                load_checkpoint(cfg, reference, self.chunks)
                self.reference = WeightCopy(self.chunks)
        self.optimizer, self.scheduler = build_optimizer(cfg, self.chunks)
        load_checkpoint(cfg, start, self.chunks, self.optimizer, self.scheduler)
        if reference == start:
            self.reference = WeightCopy(self.chunks)
        apply_flags_again(cfg, self.optimizer, self.scheduler)
        log.info("weights and optimizer are ready")
        asked = cfg.batch.start_rollout_id
        self.start_rollout_id = start.rollout_id if asked is None else asked
        interval = cfg.algorithm.ref_update_interval
        if self.reference is not None and interval and self.start_rollout_id:
            if self.start_rollout_id % interval:
                raise ConfigError(
                    f"--ref-update-interval {interval}: the reference after "
                    f"{self.start_rollout_id} rollouts was in no checkpoint. Continue with "
                    f"--ckpt-step from one whose rollouts are a multiple of {interval}."
                )
            self.reference = WeightCopy(self.chunks)

        self.sent = SentWeights(self.chunks) if cfg.algorithm.keep_old_actor else None
        self.updates = Updates(self.optimizer, self.scheduler, f"--lr {cfg.optimizer.lr}")
        self.critic: Any = None
        if cfg.algorithm.needs_critic:
            from vime.backends.megatron.critic import Critic

            self.critic = Critic(cfg, start, self.chunks)

        self.objective = objective_of(cfg.algorithm, self.hooks)

    # -- training ----------------------------------------------------------------------------------

    def train(self, batch: TrainBatch) -> dict[str, float]:
        """Every optimizer step of one rollout. Returns its metrics, the same on every rank.

        Raises RuntimeError when MAX_SKIPPED_STEPS steps in a row had a loss or gradient that is not
        finite; such a step changes nothing and is counted in `train/skipped_steps`. ConfigError
        when GPU memory runs out, with the flags that help.
        """
        longest = max(s.length for s in batch.sequences)
        with memory_remedy(self.cfg, longest):
            return self._train(batch)

    def _train(self, batch: TrainBatch) -> dict[str, float]:
        from vime.backends.megatron.rollout_columns import RolloutColumns

        clock = Clock()
        self._wait_for_weights()
        is_sft = self.cfg.algorithm.loss_type == "sft_loss"
        on_policy = False
        columns = RolloutColumns(batch, self.cfg, self.device)
        critic_only = self.cfg.algorithm.num_critic_only_steps if self.critic is not None else 0
        trains_actor = batch.rollout_id >= critic_only
        if not is_sft:
            with clock.timed("perf/log_probs_time"):
                on_policy = self._old_logps(batch, columns, trains_actor)
            if self.reference is not None:
                with clock.timed("perf/ref_log_probs_time"), self.reference.swapped_in():
                    plans = self._forward_plans(batch, 0)
                    columns.ref_logp_N = self._logps(columns, plans, "ref_")
            if self.critic is not None:
                with clock.timed("perf/values_time"):
                    columns.value_N = self.critic.values(columns, self._forward_plans(batch, 0))
            columns.set_advantages(self.cfg.algorithm, self.hooks)
        steps = []
        with clock.timed("perf/actor_train_time"):
            for step_id, plan in enumerate(batch.steps if trains_actor else ()):
                steps.append(self._step(batch, columns, plan, step_id, on_policy))
        if self.critic is not None:
            with clock.timed("perf/critic_train_time"):
                for step_id, plan in enumerate(batch.steps):
                    samples = partial(samples_of, batch, plan)
                    steps.append(self.critic.step(columns, plan, _where(batch, step_id), samples))
        self._wait_for_weights()
        interval = self.cfg.algorithm.ref_update_interval
        if self.sent is not None:
            self.sent.trained(batch.weight_version, moved=trains_actor)
        if self.reference is not None and interval and (batch.rollout_id + 1) % interval == 0:
            self.reference = WeightCopy(self.chunks)
        metrics = {**mean_of_steps(steps), **clock.seconds}
        if not is_sft:
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

    def _old_logps(self, batch: TrainBatch, columns: Any, trains_actor: bool) -> bool:
        """Log-probabilities under the weights before this rollout's first step, or those kept.

        The first step needs no pass of its own where its own forward pass still has those weights:
        the answer is then True.
        trains_actor  else no step follows, and the metrics alone want them
        """
        if self.cfg.algorithm.use_rollout_logprobs:  # the columns have them from the engine
            if not trains_actor:
                columns.own_logp_N = self._logps(columns, self._forward_plans(batch, 0))
            return False
        if self.sent is not None and not self.sent.are_current(batch.weight_version):
            self._logps_of_generator(batch, columns)
            return False
        on_policy = self._first_step_is_on_policy and trains_actor
        first = 1 if on_policy else 0
        if len(batch.steps) > first:
            columns.old_logp_N = self._logps(columns, self._forward_plans(batch, first))
        return on_policy

    def _logps_of_generator(self, batch: TrainBatch, columns: Any) -> None:
        """Those of the weights that generated the rollout.

        Of a rollout that was generated before this run began no copy is kept; the engine's own
        log-probabilities then take the place.
        """
        assert self.sent is not None
        copy = self.sent.copies.get(batch.weight_version)
        if copy is None:
            if lacking := columns.lacking_logp():
                raise ValueError(
                    f"--keep-old-actor has no copy for rollout {batch.rollout_id}, made by weights "
                    f"{batch.weight_version}, and sample {lacking[0]} has no rollout_log_probs for "
                    "some token of its loss. Let the rollout keep them, or drop the flag."
                )
            columns.old_logp_from_engine()
            return
        with copy.swapped_in():
            columns.old_logp_N = self._logps(columns, self._forward_plans(batch, 0))

    @property
    def _first_step_is_on_policy(self) -> bool:
        """Advantages that depend on the old log-probabilities need them before the first step."""
        a = self.cfg.algorithm
        no_early_use = a.kl_coef == 0.0 and self.hooks.advantage is None
        return no_early_use and not a.use_rollout_logprobs

    def _forward_plans(self, batch: TrainBatch, first_step: int) -> list[StepPlan]:
        return [batch.forward] if batch.forward is not None else list(batch.steps[first_step:])

    def _logps(self, columns: Any, plans: list[StepPlan], prefix: str = "") -> Tensor:
        """A column of log-probabilities under the weights that the chunks hold now.

        prefix  tells the user's hook whose they are
        """
        from vime.backends.megatron.step import remember_logps, run_pass

        if self.hooks.before_log_probs is not None:
            self.hooks.before_log_probs(self.hooks.args, self.chunks, prefix)
        column_N = columns.table.column()
        batches = [b for plan in plans for b in columns.micro_batches(plan)]
        run_pass(
            self.chunks,
            batches,
            columns.table,
            remember_logps(column_N),
            temperature=self.temperature,
            forward_only=True,
            chunk_tokens=self.cfg.batch.log_probs_chunk,
        )
        return column_N

    def _step(
        self, batch: TrainBatch, columns: Any, plan: StepPlan, step_id: int, on_policy: bool
    ) -> dict[str, float]:
        from vime.backends.megatron.step import policy_judge, run_pass, sft_judge

        if self.hooks.before_train_step is not None:
            optimizer, scheduler = self.optimizer, self.scheduler
            where = (batch.rollout_id, step_id)
            self.hooks.before_train_step(self.hooks.args, *where, self.chunks, optimizer, scheduler)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        spoilt_N = columns.table.column()
        if self.cfg.algorithm.loss_type == "sft_loss":
            judge = sft_judge(columns.table, spoilt_N)
        else:
            judge = policy_judge(
                columns.table,
                self.objective,
                columns.adv_N,
                columns.old_logp_N,
                columns.ref_logp_N,
                on_policy=step_id == 0 and on_policy,
                own_logp_N=columns.own_logp_N,
                spoilt_N=spoilt_N,
            )
        sums = run_pass(
            self.chunks,
            columns.micro_batches(plan),
            columns.table,
            judge,
            temperature=self.temperature,
            forward_only=False,
            chunk_tokens=self.cfg.batch.log_probs_chunk,
        )
        names = _STEP_SUMS
        if self.hooks.loss is not None or self.hooks.correct is not None:
            names = _names_on_all_ranks(sums)
        figures = columns.reduce(sums, names)
        weight = figures.pop("weight", 0.0)
        metrics = {"train/loss": figures.pop("loss", 0.0)}
        metrics |= {f"train/{name}": total / weight for name, total in figures.items() if weight}

        def samples() -> str:
            return samples_of(batch, plan, columns.spoilt(plan, spoilt_N))

        norm = self.updates.take(metrics["train/loss"], _where(batch, step_id), samples)
        if norm is None:
            return {"train/skipped_steps": 1.0}
        return {
            **metrics,
            "train/grad_norm": norm,
            "train/lr": self.updates.lr,
            "train/skipped_steps": 0.0,
        }

    def _wait_for_weights(self) -> None:
        """With --overlap-param-gather weights arrive during the next forward pass; not later."""
        if self.cfg.parallel.overlap_param_gather:
            for model in self._models():
                for chunk in model.chunks:
                    chunk.start_param_sync(force_sync=True)

    def _models(self) -> Iterator[Any]:
        """Actor and critic: what has `chunks` and an `optimizer`."""
        yield self
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
            stay = {w.untyped_storage()._cdata for w in weights_of(self.chunks)}
            leaving = [t for t in leaving if t.untyped_storage()._cdata not in stay]
        self.away.leave(leaving, dropped=dropped)

    def free_cache(self) -> None:
        """Makes room without moving state: gives back what torch keeps for later allocations."""
        torch.cuda.empty_cache()

    def onload(self) -> None:
        """Takes the GPU back, up to --train-memory-margin-bytes."""
        leave_free(self.cfg.cluster.train_memory_margin_bytes)
        self.away.come_back()

    # -- weights -----------------------------------------------------------------------------------

    def connect_engines(self, urls: list[str]) -> None:
        """Prepares weight updates into these engines, also after one of them was replaced."""
        from vime.backends.vllm.client import EngineClient
        from vime.weight_sync import make_sender

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
        from vime.backends.megatron.hf import export_hf

        if self.sender is None:
            raise RuntimeError("update_weights before connect_engines: no engine is known")
        self._wait_for_weights()
        report = self.sender.send(export_hf(self.chunks, self.cfg), version)
        if self.sent is not None:
            self.sent.keep(version)
        return {
            "perf/update_weights_time": report.seconds,
            "perf/update_weights_bytes": float(report.bytes),
            **{f"perf/update_weights/{name}": s for name, s in report.phases.items()},
        }

    def save(self, rollout_id: int) -> None:
        """A checkpoint of everything that continuing needs, under --save.

        With --async-save it is copied here, and written and committed while training goes on.
        """
        from vime.backends.megatron.checkpoint import save_checkpoint

        self._wait_for_weights()
        files = self.cfg.checkpoint
        optimizer = self.optimizer if files.save_optim else None
        extra = {"rollout_id": rollout_id}
        if files.async_save and self.saves is None:
            self.saves = BackgroundSaves()
        state = (self.chunks, optimizer, self.scheduler, extra)
        save_checkpoint(
            self.cfg, files.save, rollout_id, *state, critic=self.critic, background=self.saves
        )

    def finish_saves(self) -> None:
        """Waits until the checkpoint under way is committed. CheckpointError if it failed."""
        if self.saves is not None:
            self.saves.finish()

    def save_hf(self, path: str) -> None:
        """The weights as a Hugging Face folder that stands alone."""
        from vime.backends.megatron.hf import save_hf

        self._wait_for_weights()
        save_hf(self.chunks, self.cfg, path)

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


# Everything that a step may sum over tokens, in the order of the reduced vector.
_STEP_SUMS = (
    "weight",
    "loss",
    "pg_loss",
    "pg_clipfrac",
    "ppo_kl",
    "kl_loss",
    "entropy_loss",
    "tis",
    "tis_clipfrac",
    "tis_vetofrac",
    "opsm_clipfrac",
)


def _where(batch: TrainBatch, step_id: int) -> str:
    return f"rollout {batch.rollout_id}, step {step_id}"


def _names_on_all_ranks(sums: dict[str, Tensor]) -> list[str]:
    """The same names in the same order everywhere: only the last pipeline stage has sums."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, list(sums))
    return sorted({name for names in found for name in names})
