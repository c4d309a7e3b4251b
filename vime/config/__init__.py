"""The typed, frozen configuration of a run. `vime/cli` fills it from flags."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vime.config.sections.algorithm import AlgorithmConfig
from vime.config.sections.cluster import ClusterConfig
from vime.config.sections.evaluation import EvalConfig
from vime.config.sections.machine import (
    DebugConfig,
    EngineConfig,
    LogConfig,
    ParallelConfig,
)
from vime.config.sections.model import CheckpointConfig, ModelConfig, OptimizerConfig
from vime.config.sections.prompts import BatchConfig, DataConfig
from vime.config.sections.rollout import RewardConfig, RolloutConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    cluster: ClusterConfig
    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    data: DataConfig
    batch: BatchConfig
    rollout: RolloutConfig
    reward: RewardConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    algorithm: AlgorithmConfig
    engine: EngineConfig
    log: LogConfig
    debug: DebugConfig

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.parallel.data_parallel_size(self.cluster.trainer_gpus)

    @property
    def of_critic(self) -> Config:
        """The critic's configuration. Its optimizer takes steps from the first rollout on."""
        algorithm = replace(self.algorithm, num_critic_only_steps=0)
        return replace(self, optimizer=self.optimizer.of_critic, algorithm=algorithm)

    @property
    def takes_old_policy_from_engine(self) -> bool:
        """Whether the fully asynchronous mode decides for --use-rollout-logprobs.

        The weights change during a response, so only the engine's figures are right for each token.
        """
        a = self.algorithm
        chosen = a.use_tis or a.use_rollout_logprobs or a.keep_old_actor
        return self.rollout.fully_async and a.needs_reward and not chosen

    @property
    def decay_steps(self) -> int | None:
        """Optimizer steps until the learning rate's decay ends, warm-up included.

        None with --num-epoch, where the data determines the number.
        """
        if self.optimizer.lr_decay_iters is not None:
            return self.optimizer.lr_decay_iters
        if self.batch.num_rollout is None:
            return None
        rollouts = self.batch.num_rollout - self.algorithm.num_critic_only_steps
        return rollouts * self.batch.steps_per_rollout

    @property
    def router_policy(self) -> str:
        """--vllm-router-policy, or its default.

        With a custom generation function, all requests of a sample go to the engine that has the
        sample's tokens in its cache.
        """
        turns = self.rollout.custom_generate_path is not None
        default = "sticky_least_loaded" if turns else "round_robin"
        return self.engine.router_policy_asked or default

    @property
    def total_gpus(self) -> int:
        """GPUs of the whole run."""
        if self.debug.no_engines:
            return self.cluster.trainer_gpus
        return self.cluster.rollout_gpus if self.debug.rollout_only else self.cluster.total_gpus
