"""The policy in training: model, optimizer and loss, and the policies that it is compared with."""

from __future__ import annotations

import logging
from functools import partial

import torch.distributed as dist
from torch import Tensor

from vime.backends.megatron.checkpoints.load import load_checkpoint
from vime.backends.megatron.checkpoints.start import Start, reference_start, teacher_start
from vime.backends.megatron.memory.weight_copies import SentWeights, WeightCopy
from vime.backends.megatron.model.build import build_model
from vime.backends.megatron.training.losses import objective_of
from vime.backends.megatron.training.optimizer import (
    apply_flags_again,
    build_optimizer,
    wrap_for_training,
)
from vime.backends.megatron.training.report import samples_of
from vime.backends.megatron.training.rollout_columns import RolloutColumns
from vime.backends.megatron.training.step import policy_judge, remember_logps, run_pass, sft_judge
from vime.backends.megatron.training.update import Updates
from vime.config import Config
from vime.config.view import ArgsView
from vime.errors import ConfigError
from vime.types import StepPlan, TrainBatch

log = logging.getLogger(__name__)


class Actor:
    """Built by every rank together; every method is a collective.

    start          where its weights come from; a checkpoint that resumes brings the optimizer too
    first_rollout  the first that it will train
    reference      the model that KL is measured to, where one is needed
    teacher        the one that advantages distil, under --use-opd
    sent           copies of the weights that engines were given, under --keep-old-actor
    """

    def __init__(self, cfg: Config, start: Start, first_rollout: int) -> None:
        self.cfg, self.args = cfg, ArgsView(cfg)
        self.before_log_probs = cfg.algorithm.plugin("before_log_probs_path")
        self.before_train_step = cfg.algorithm.plugin("before_train_step_path")
        self.is_sft = not cfg.algorithm.wants_reward
        self.temperature = 1.0 if self.is_sft else cfg.rollout.temperature or 1.0
        changed = cfg.algorithm.plugin("model_provider_path")
        provider = partial(changed, self.args) if changed else None
        self.chunks = wrap_for_training(cfg, build_model(cfg, provider=provider))
        log.info("the model is built; weights come from %s", start.folder)
        self.reference: WeightCopy | None = None
        self.teacher: WeightCopy | None = None
        if cfg.algorithm.needs_teacher:
            load_checkpoint(cfg, teacher_start(cfg), self.chunks)
            self.teacher = WeightCopy(self.chunks)
        reference = None
        if cfg.algorithm.needs_reference:
            reference = reference_start(cfg)
            if reference != start:
                load_checkpoint(cfg, reference, self.chunks)
                self.reference = WeightCopy(self.chunks)
        self.optimizer, self.scheduler = build_optimizer(cfg, self.chunks)
        load_checkpoint(cfg, start, self.chunks, self.optimizer, self.scheduler)
        if self._was_the_reference_updated(first_rollout) or reference == start:
            self.reference = WeightCopy(self.chunks)
        apply_flags_again(cfg, self.optimizer, self.scheduler)
        log.info("weights and optimizer are ready")
        self.sent = SentWeights(self.chunks) if cfg.algorithm.keep_old_actor else None
        lr_flag = f"--lr {cfg.optimizer.lr}"
        self.updates = Updates(self.chunks, self.optimizer, self.scheduler, lr_flag)
        self.objective = objective_of(cfg)

    def _was_the_reference_updated(self, first_rollout: int) -> bool:
        """Whether the run before this one made the actor its reference when it was saved."""
        interval = self.cfg.algorithm.ref_update_interval
        if not (self.cfg.algorithm.needs_reference and interval and first_rollout):
            return False
        if first_rollout % interval:
            raise ConfigError(
                f"--ref-update-interval {interval}: the reference after {first_rollout} rollouts "
                f"was in no checkpoint. Continue with --ckpt-step from one whose rollouts are a "
                f"multiple of {interval}."
            )
        return True

    # -- log-probabilities -------------------------------------------------------------------------

    def old_logps(self, batch: TrainBatch, columns: RolloutColumns, *, trains: bool) -> bool:
        """Log-probabilities under the weights before this rollout's first step, or those kept.

        The first step needs no pass of its own where its own forward pass still has those weights:
        the answer is then True.
        trains  else no step follows, and the metrics alone want them
        """
        if self.cfg.algorithm.use_rollout_logprobs:  # the columns have them from the engine
            if not trains:
                columns.own_logp_N = self.logps(columns, forward_plans(batch))
            return False
        if self.sent is not None and not self.sent.are_current(batch.weight_version):
            self._logps_of_generator(batch, columns)
            return False
        on_policy = self._first_step_is_on_policy and trains
        first = 1 if on_policy else 0
        if len(batch.steps) > first:
            columns.old_logp_N = self.logps(columns, forward_plans(batch, first))
        return on_policy

    def logps_of(
        self, copy: WeightCopy, batch: TrainBatch, columns: RolloutColumns, prefix: str = ""
    ) -> Tensor:
        """A column of the rollout's log-probabilities under other weights."""
        with copy.swapped_in():
            return self.logps(columns, forward_plans(batch), prefix)

    def _logps_of_generator(self, batch: TrainBatch, columns: RolloutColumns) -> None:
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
        columns.old_logp_N = self.logps_of(copy, batch, columns)

    @property
    def _first_step_is_on_policy(self) -> bool:
        """Advantages that depend on the old log-probabilities need them before the first step."""
        a = self.cfg.algorithm
        no_early_use = a.kl_coef == 0.0 and not a.use_opd and a.custom_advantage_path is None
        return no_early_use and not a.use_rollout_logprobs

    def logps(self, columns: RolloutColumns, plans: list[StepPlan], prefix: str = "") -> Tensor:
        """A column of log-probabilities under the weights that the chunks hold now.

        prefix  tells the user's hook whose they are
        """
        if self.before_log_probs is not None:
            self.before_log_probs(self.args, self.chunks, prefix)
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

    # -- steps -------------------------------------------------------------------------------------

    def step(
        self, batch: TrainBatch, columns: RolloutColumns, step_id: int, *, on_policy: bool
    ) -> dict[str, float]:
        """One optimizer step. Gives its metrics, none for a step that `Updates.take` skips."""
        plan = batch.steps[step_id]
        if self.before_train_step is not None:
            trained = (self.chunks, self.optimizer, self.scheduler)
            self.before_train_step(self.args, batch.rollout_id, step_id, *trained)
        self.updates.begin()
        spoilt_N = columns.table.column()
        if self.is_sft:
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
        a = self.cfg.algorithm
        if a.custom_loss_path is not None or a.custom_tis_path is not None:
            names = _names_on_all_ranks(sums)
        figures = columns.reduce(sums, names)
        weight = figures.pop("weight", 0.0)
        metrics = {"train/loss": figures.pop("loss", 0.0)}
        metrics |= {f"train/{name}": total / weight for name, total in figures.items() if weight}

        def samples() -> str:
            return samples_of(batch, plan, columns.spoilt(plan, spoilt_N))

        norm = self.updates.take(metrics["train/loss"], where_in(batch, step_id), samples)
        if norm is None:
            return {}
        return {
            **metrics,
            "train/grad_norm": norm,
            "train/lr": self.updates.lr,
        }

    def finish(self, batch: TrainBatch, *, trained: bool) -> None:
        """After a rollout's last step: what was sent is older now, and the reference may be due."""
        interval = self.cfg.algorithm.ref_update_interval
        if self.sent is not None:
            self.sent.trained(batch.weight_version, moved=trained)
        if self.reference is not None and interval and (batch.rollout_id + 1) % interval == 0:
            self.reference = WeightCopy(self.chunks)


def forward_plans(batch: TrainBatch, first_step: int = 0) -> list[StepPlan]:
    """Of a pass without gradients: packs of its own size where it has one."""
    return [batch.forward] if batch.forward is not None else list(batch.steps[first_step:])


def where_in(batch: TrainBatch, step_id: int) -> str:
    return f"rollout {batch.rollout_id}, step {step_id}"


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


def _names_on_all_ranks(sums: dict[str, Tensor]) -> list[str]:
    """The same names in the same order everywhere: only the last pipeline stage has sums."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, list(sums))
    return sorted({name for names in found for name in names})
