"""The policy being trained: model, optimizer and loss, with the reference and the teacher."""

from __future__ import annotations

import logging
from functools import partial

from torch import Tensor

from vime.backends.megatron.checkpoints.load import load_checkpoint
from vime.backends.megatron.checkpoints.start import Start, reference_start, teacher_start
from vime.backends.megatron.memory.weight_copies import SentWeights, WeightCopy
from vime.backends.megatron.model.build import build_model
from vime.backends.megatron.training.judges import policy_judge, remember_logps, sft_judge
from vime.backends.megatron.training.losses import objective_of
from vime.backends.megatron.training.optimizer import (
    apply_flags_again,
    build_optimizer,
    wrap_for_training,
)
from vime.backends.megatron.training.passes import Judge, run_pass
from vime.backends.megatron.training.report import samples_of, where_in
from vime.backends.megatron.training.rollout_columns import RolloutColumns
from vime.backends.megatron.training.totals import Sums, step_means
from vime.backends.megatron.training.update import Updates
from vime.config import Config
from vime.config.view import ArgsView
from vime.errors import ConfigError
from vime.types import RankBatch, StepPlan

log = logging.getLogger(__name__)


class Actor:
    """All ranks build their actors together, and every method is a collective.

    start          the source of the weights and, if the run resumes, of the optimizer's state
    first_rollout  the first rollout to train on
    reference      the model of the KL terms, if a flag needs it
    teacher        the model to distil, under --use-opd
    sent           copies of the weights that the engines got, under --keep-old-actor
    """

    def __init__(self, cfg: Config, start: Start, first_rollout: int) -> None:
        self.cfg, self.args = cfg, ArgsView(cfg)
        self.before_log_probs = cfg.algorithm.plugin("before_log_probs_path")
        self.before_train_step = cfg.algorithm.plugin("before_train_step_path")
        self.is_sft = not cfg.algorithm.needs_reward
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
        """Whether the earlier run copied the actor into the reference just before its save."""
        interval = self.cfg.algorithm.ref_update_interval
        if not (self.cfg.algorithm.needs_reference and interval and first_rollout):
            return False
        if first_rollout % interval:
            raise ConfigError(
                f"--ref-update-interval {interval}: no checkpoint holds the reference that the run "
                f"had after {first_rollout} rollouts. Continue with --ckpt-step from a checkpoint "
                f"after a multiple of {interval} rollouts."
            )
        return True

    # -- log-probabilities -------------------------------------------------------------------------

    def old_logps(self, batch: RankBatch, columns: RolloutColumns, *, trains: bool) -> bool:
        """Fills the old policy's column. Returns whether the first step must fill its own part.

        The old policy has the weights before this rollout's first step, unless --keep-old-actor or
        --use-rollout-logprobs choose another. The first step's own forward pass still runs with
        those weights, so its tokens need no earlier pass.

        trains  whether optimizer steps follow; otherwise the log-probabilities serve the metrics
                only
        """
        if self.cfg.algorithm.use_rollout_logprobs:  # the columns hold the engine's
            if not trains:
                columns.own_logp_N = self.logps(columns, forward_plans(batch))
            return False
        if self.sent is not None and not self.sent.are_current(batch.weight_version):
            self._logps_of_generator(batch, columns)
            return False
        on_policy = trains and not self._advantages_need_old_logps
        first = 1 if on_policy else 0
        if len(batch.steps) > first:
            columns.old_logp_N = self.logps(columns, forward_plans(batch, first))
        return on_policy

    @property
    def _advantages_need_old_logps(self) -> bool:
        a = self.cfg.algorithm
        return a.kl_coef != 0.0 or a.use_opd or a.custom_advantage_path is not None

    def _logps_of_generator(self, batch: RankBatch, columns: RolloutColumns) -> None:
        """Fills the old policy's column from the weights that generated the rollout.

        A rollout from before this run has no copy of its weights. It uses the engine's
        log-probabilities instead.
        """
        assert self.sent is not None
        copy = self.sent.copies.get(batch.weight_version)
        if copy is None:
            if lacking := columns.lacking_logp():
                raise ValueError(
                    f"--keep-old-actor has no copy of weights {batch.weight_version}, which "
                    f"generated rollout {batch.rollout_id}, and sample {lacking[0]} has no "
                    "rollout_log_probs at a token with loss. Keep them in the rollout, or leave "
                    "the flag out."
                )
            columns.old_logp_from_engine()
            return
        columns.old_logp_N = self.logps_of(copy, batch, columns)

    def logps_of(
        self, copy: WeightCopy, batch: RankBatch, columns: RolloutColumns, prefix: str = ""
    ) -> Tensor:
        """A column of the rollout's log-probabilities under other weights."""
        with copy.swapped_in():
            return self.logps(columns, forward_plans(batch), prefix)

    def logps(self, columns: RolloutColumns, plans: list[StepPlan], prefix: str = "") -> Tensor:
        """A column of log-probabilities under the weights that the chunks hold now.

        prefix  the model's name, for the user's hook
        """
        if self.before_log_probs is not None:
            self.before_log_probs(self.args, self.chunks, prefix)
        column_N = columns.table.column()
        self._run(columns, plans, remember_logps(column_N), forward_only=True)
        return column_N

    # -- steps -------------------------------------------------------------------------------------

    def step(
        self, batch: RankBatch, columns: RolloutColumns, step_id: int, *, on_policy: bool
    ) -> dict[str, float]:
        """One optimizer step. Returns its metrics; `Updates.take` says when a step is skipped."""
        plan = batch.steps[step_id]
        if self.before_train_step is not None:
            trained = (self.chunks, self.optimizer, self.scheduler)
            self.before_train_step(self.args, batch.rollout_id, step_id, *trained)
        self.updates.begin()
        spoilt_N = columns.table.column()
        judge = self._judge(columns, spoilt_N, on_policy=step_id == 0 and on_policy)
        sums = self._run(columns, [plan], judge, forward_only=False)
        loss, means = step_means(sums, spoilt_N.device)

        def samples() -> str:
            return samples_of(batch, plan, columns.not_finite(plan, spoilt_N))

        metrics = {"train/loss": loss, **means}
        return self.updates.take(loss, metrics, where_in(batch, step_id), samples)

    def _judge(self, columns: RolloutColumns, spoilt_N: Tensor, *, on_policy: bool) -> Judge:
        if self.is_sft:
            return sft_judge(columns.table, spoilt_N)
        return policy_judge(
            columns.table,
            self.objective,
            columns.adv_N,
            columns.old_logp_N,
            columns.ref_logp_N,
            on_policy=on_policy,
            own_logp_N=columns.own_logp_N,
            spoilt_N=spoilt_N,
        )

    def _run(
        self, columns: RolloutColumns, plans: list[StepPlan], judge: Judge, *, forward_only: bool
    ) -> Sums:
        return run_pass(
            self.chunks,
            [b for plan in plans for b in columns.micro_batches(plan)],
            columns.table,
            judge,
            temperature=self.temperature,
            forward_only=forward_only,
            chunk_tokens=self.cfg.batch.log_probs_chunk,
        )

    def finish(self, batch: RankBatch, *, trained: bool) -> None:
        """After a rollout's last step: drops copies of old weights, updates the reference if due.

        trained  whether the actor took steps
        """
        interval = self.cfg.algorithm.ref_update_interval
        if self.sent is not None:
            self.sent.trained(batch.weight_version, moved=trained)
        if self.reference is not None and interval and (batch.rollout_id + 1) % interval == 0:
            self.reference = WeightCopy(self.chunks)


def forward_plans(batch: RankBatch, first_step: int = 0) -> list[StepPlan]:
    """The packs of a forward-only pass: `batch.forward` if there is one, else the steps' packs."""
    return [batch.forward] if batch.forward is not None else list(batch.steps[first_step:])
