"""Training on one rollout: forward passes, advantages, then the optimizer steps."""

from __future__ import annotations

from functools import partial

import torch

from vime.backends.megatron.training.actor import Actor, forward_plans
from vime.backends.megatron.training.advantages import set_advantages
from vime.backends.megatron.training.critic import Critic
from vime.backends.megatron.training.report import Clock, mean_of_steps, samples_of, where_in
from vime.backends.megatron.training.rollout_columns import RolloutColumns
from vime.backends.megatron.training.rollout_metrics import rollout_metrics
from vime.config import Config
from vime.types import RankBatch

_ACTOR_TRAIN_TIME = "perf/actor_train_time"


class OneRollout:
    """One batch, its columns and its clock.

    trains_actor  False in the first rollouts of PPO, which train the critic alone
    clock         seconds of each phase, for the metrics
    """

    def __init__(
        self,
        cfg: Config,
        batch: RankBatch,
        actor: Actor,
        critic: Critic | None,
        device: torch.device,
    ) -> None:
        self.cfg, self.batch = cfg, batch
        self.actor, self.critic = actor, critic
        critic_only = cfg.algorithm.num_critic_only_steps if critic is not None else 0
        self.trains_actor = batch.rollout_id >= critic_only
        self.columns = RolloutColumns(batch, cfg, device)
        self.clock = Clock()

    @property
    def actor_train_s(self) -> float:
        """Duration of the actor's optimizer steps."""
        return self.clock.seconds[_ACTOR_TRAIN_TIME]

    def train(self) -> dict[str, float]:
        """Runs every phase and returns the metrics. A collective."""
        on_policy = False
        if not self.actor.is_sft:
            on_policy = self._forward_passes()
            set_advantages(self.columns, self.cfg.algorithm, self.actor.args)
        metrics = mean_of_steps(self._actor_steps(on_policy) + self._critic_steps())
        if not self.actor.is_sft:
            metrics |= rollout_metrics(self.columns, self.cfg.algorithm)
        return metrics | self.clock.seconds

    def _forward_passes(self) -> bool:
        """Fills the columns of log-probabilities and values under the current weights.

        Returns whether the first step, which runs with the same weights, must fill its own part of
        the actor's column.
        """
        actor, batch, columns, timed = self.actor, self.batch, self.columns, self.clock.timed
        with timed("perf/log_probs_time"):
            on_policy = actor.old_logps(batch, columns, trains=self.trains_actor)
        if actor.reference is not None:
            with timed("perf/ref_log_probs_time"):
                columns.ref_logp_N = actor.logps_of(actor.reference, batch, columns, "ref_")
        if actor.teacher is not None:
            with timed("perf/teacher_log_probs_time"):
                columns.teacher_logp_N = actor.logps_of(actor.teacher, batch, columns, "teacher_")
        if self.critic is not None:
            with timed("perf/values_time"):
                columns.value_N = self.critic.values(columns, forward_plans(batch))
        return on_policy

    def _actor_steps(self, on_policy: bool) -> list[dict[str, float]]:
        num_steps = len(self.batch.steps) if self.trains_actor else 0
        with self.clock.timed(_ACTOR_TRAIN_TIME):
            return [
                self.actor.step(self.batch, self.columns, step_id, on_policy=on_policy)
                for step_id in range(num_steps)
            ]

    def _critic_steps(self) -> list[dict[str, float]]:
        if self.critic is None:
            return []
        with self.clock.timed("perf/critic_train_time"):
            return [self._critic_step(step_id) for step_id in range(len(self.batch.steps))]

    def _critic_step(self, step_id: int) -> dict[str, float]:
        assert self.critic is not None
        plan, where = self.batch.steps[step_id], where_in(self.batch, step_id)
        return self.critic.step(self.columns, plan, where, partial(samples_of, self.batch, plan))
