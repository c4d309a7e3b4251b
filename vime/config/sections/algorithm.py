"""The algorithm: estimator, loss, reference, corrections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vime.algorithms.advantages import ESTIMATORS, Estimator, estimators_where
from vime.algorithms.kl import KL_TYPES
from vime.algorithms.off_policy import LEVELS, MODES
from vime.config.fields import Section, flag
from vime.plugins.batch import REDUCER
from vime.plugins.trainer import (
    ADVANTAGE,
    BEFORE_LOG_PROBS,
    BEFORE_TRAIN_STEP,
    INIT,
    LOSS,
    MODEL,
    TIS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig(Section):
    loss_type: str = flag(
        "--loss-type",
        "custom_loss: that of --custom-loss-function-path, which policy_loss takes too",
        default="policy_loss",
        choices=("policy_loss", "sft_loss", "custom_loss"),
    )
    advantage_estimator: str = flag(
        "--advantage-estimator",
        default="grpo",
        choices=tuple(ESTIMATORS),
    )
    use_kl_loss: bool = flag(
        "--use-kl-loss", "KL to the reference model as a loss; also logs it", default=False
    )
    kl_loss_coef: float = flag("--kl-loss-coef", default=0.0, at_least=0)
    kl_loss_type: str = flag("--kl-loss-type", default="k1", choices=tuple(KL_TYPES))
    unbiased_kl: bool = flag(
        "--use-unbiased-kl", "the KL loss times the ratio of new and old policy", default=False
    )
    kl_coef: float = flag(
        "--kl-coef", "KL to the reference model as a penalty on the reward", default=0.0, at_least=0
    )
    use_opd: bool = flag(
        "--use-opd",
        "on-policy distillation: a token's advantage loses the KL to a teacher at that token",
        default=False,
    )
    opd_type: str = flag(
        "--opd-type",
        "where the teacher computes: in the trainer's ranks, a model of the policy's architecture; or behind a vLLM server, one of the policy's vocabulary",
        default="megatron",
        choices=("megatron", "vllm"),
    )
    opd_teacher_url: str | None = flag(
        "--opd-teacher-url",
        "http://HOST:PORT of the teacher of --opd-type vllm; without it a function of yours sets Sample.teacher_log_probs",
        default=None,
    )
    opd_kl_coef: float = flag(
        "--opd-kl-coef", "advantage for each nat of that KL", default=1.0, above=0
    )
    entropy_coef: float = flag("--entropy-coef", default=0.0)
    clip_low: float = flag("--eps-clip", default=0.2, at_least=0)
    clip_high_asked: float | None = flag(
        "--eps-clip-high", default=None, at_least=0, inherits="--eps-clip"
    )
    dual_clip: float | None = flag(
        "--eps-clip-c", "dual clip's constant, above 1", default=None, above=1
    )
    gamma: float = flag(
        "--gamma", "discount of a later token's reward", default=1.0, at_least=0, at_most=1
    )
    lambd: float = flag(
        "--lambd",
        "with a critic: GAE's lambda; 1: the critic is a baseline only",
        default=1.0,
        at_least=0,
        at_most=1,
    )
    value_clip: float = flag(
        "--value-clip",
        "with a critic: how far a value may move from the rollout's first before its gradient ends",
        default=0.2,
        above=0,
    )
    num_critic_only_steps: int = flag(
        "--num-critic-only-steps",
        "with a critic: the first so many rollouts train the critic alone",
        default=0,
        at_least=0,
    )
    per_token_loss: bool = flag(
        "--calculate-per-token-loss",
        "mean over the step's tokens, not over samples of token means",
        default=False,
    )
    normalize_advantages: bool = flag(
        "--normalize-advantages", "whiten over the step", default=False
    )
    grpo_std: bool = flag(
        "--grpo-std-normalization", default=True, negated="--disable-grpo-std-normalization"
    )
    normalize_rewards: bool = flag(
        "--rewards-normalization", default=True, negated="--disable-rewards-normalization"
    )
    compute_advantages: bool = flag(
        "--compute-advantages-and-returns",
        "sft_loss has none, whatever is said",
        default=True,
        negated="--disable-compute-advantages-and-returns",
    )
    overlong_buffer_len: int | None = flag(
        "--overlong-buffer-len",
        "a response that enters the last so many tokens of --rollout-max-response-len loses reward, linearly (DAPO)",
        default=None,
        at_least=1,
    )
    overlong_penalty: float = flag(
        "--overlong-penalty-factor", "what a response of full length loses", default=1.0, above=0
    )
    use_rollout_logprobs: bool = flag(
        "--use-rollout-logprobs",
        "the old policy is the engine's: the ratio starts from the log-probabilities that sampling returned",
        default=False,
    )
    keep_old_actor: bool = flag(
        "--keep-old-actor",
        "the old policy is the one that generated: kept copies of the weights that engines were given",
        default=False,
    )
    use_tis: bool = flag(
        "--use-tis",
        "weigh each token's loss by trainer's over engine's probability (truncated importance sampling)",
        default=False,
    )
    tis_clip: float = flag("--tis-clip", "largest weight", default=2.0, above=0)
    tis_clip_low: float = flag("--tis-clip-low", "smallest weight", default=0.0, at_least=0)
    tis_level: str = flag(
        "--tis-level",
        "the weight is of a token, of its sequence (product), or geometric (the sequence's mean)",
        default="token",
        choices=tuple(LEVELS),
    )
    tis_mode: str = flag(
        "--tis-mode",
        "beyond the bounds: clip to them, or mask (on tokens: IcePop)",
        default="clip",
        choices=tuple(MODES),
    )
    tis_veto: float | None = flag(
        "--tis-veto",
        "a sequence with a token whose own weight is below this gets no loss, for example 1e-4",
        default=None,
        above=0,
        at_most=1,
    )
    custom_tis_path: str | None = flag(
        "--custom-tis-function-path",
        "weighs the loss in place of the --tis-* flags",
        default=None,
        hook=TIS,
    )
    custom_loss_path: str | None = flag(
        "--custom-loss-function-path", "the whole policy loss", default=None, hook=LOSS
    )
    custom_advantage_path: str | None = flag(
        "--custom-advantage-function-path",
        "advantages in place of those of --advantage-estimator",
        default=None,
        hook=ADVANTAGE,
    )
    custom_reducer_path: str | None = flag(
        "--custom-pg-loss-reducer-function-path",
        "each token's weight in the loss of its step",
        default=None,
        hook=REDUCER,
    )
    megatron_init_path: str | None = flag(
        "--custom-megatron-init-path",
        "runs in every trainer rank after the ranks are connected and before the model is built",
        default=None,
        hook=INIT,
    )
    model_provider_path: str | None = flag(
        "--custom-model-provider-path",
        "changes a chunk of Megatron's model, or returns another with the same names of weights",
        default=None,
        hook=MODEL,
    )
    before_log_probs_path: str | None = flag(
        "--custom-megatron-before-log-prob-hook-path",
        "runs before a pass for log-probabilities; store_prefix is 'ref_' for the reference, 'teacher_' for the teacher",
        default=None,
        hook=BEFORE_LOG_PROBS,
    )
    before_train_step_path: str | None = flag(
        "--custom-megatron-before-train-step-hook-path",
        "runs before every optimizer step",
        default=None,
        hook=BEFORE_TRAIN_STEP,
    )
    ref_update_interval: int | None = flag(
        "--ref-update-interval",
        "the reference becomes the actor after every so many rollouts (default: never)",
        default=None,
        at_least=1,
    )
    use_opsm: bool = flag(
        "--use-opsm",
        "no loss on sequences with a negative advantage that the policy has left",
        default=False,
    )
    opsm_delta: float = flag(
        "--opsm-delta",
        "left: the mean of old - new log-probability is above this",
        default=1e-4,
        at_least=0,
    )
    mismatch_metrics: bool = flag(
        "--get-mismatch-metrics",
        "train/mismatch_*: how far trainer and engine are apart",
        default=False,
    )
    seed: int = flag("--seed", default=1234)

    @property
    def estimator(self) -> Estimator:
        return ESTIMATORS[self.advantage_estimator]

    @property
    def wants_reward(self) -> bool:
        """A policy learns from its own samples; not so under sft_loss."""
        return self.loss_type != "sft_loss"

    @property
    def needs_rollout_logp(self) -> str | None:
        """The flag that cannot do without the engine's log-probabilities, if any."""
        if not self.wants_reward:
            return None
        asked = {
            "--use-rollout-logprobs": self.use_rollout_logprobs,
            "--use-tis": self.use_tis,
            "--get-mismatch-metrics": self.mismatch_metrics,
        }
        return next((name for name, wanted in asked.items() if wanted), None)

    @property
    def clip_high(self) -> float:
        return self.clip_low if self.clip_high_asked is None else self.clip_high_asked

    @property
    def needs_reference(self) -> bool:
        return self.wants_reward and (self.use_kl_loss or self.kl_coef != 0.0)

    @property
    def needs_teacher(self) -> bool:
        """Whether the trainer's ranks hold one."""
        return self.wants_reward and self.use_opd and self.opd_type == "megatron"

    @property
    def needs_teacher_logp(self) -> bool:
        """Whether samples bring a teacher's log-probabilities along."""
        return self.wants_reward and self.use_opd and self.opd_type == "vllm"

    @property
    def needs_critic(self) -> bool:
        return self.wants_reward and self.estimator.critic

    def problems(self) -> Iterator[str]:
        if self.advantage_estimator in ESTIMATORS:
            yield from self._problems_of_the_estimator()
        if not self.compute_advantages and self.wants_reward:
            yield f"--disable-compute-advantages-and-returns leaves --loss-type {self.loss_type} nothing to learn from. Leave it out."
        if self.kl_coef and self.kl_loss_coef:
            yield (
                f"--kl-coef {self.kl_coef} and --kl-loss-coef {self.kl_loss_coef} exclude each other: "
                "the first is a penalty on the reward, the second a loss. Set one to 0."
            )
        if self.kl_loss_coef and not self.use_kl_loss:
            yield f"--kl-loss-coef {self.kl_loss_coef} has no effect without --use-kl-loss. Add that, or set the coefficient to 0."
        if self.unbiased_kl and not self.use_kl_loss:
            yield "--use-unbiased-kl has no effect without --use-kl-loss. Add that, or leave it out."
        if self.use_opd and not self.wants_reward:
            yield f"--use-opd has no part in --loss-type {self.loss_type}. Leave it out."
        if self.opd_teacher_url is not None and not (self.use_opd and self.opd_type == "vllm"):
            yield f"--opd-teacher-url {self.opd_teacher_url} has no effect without --use-opd --opd-type vllm. Add those, or leave it out."
        if self.opd_teacher_url is not None and not self.opd_teacher_url.startswith(
            ("http://", "https://")
        ):
            yield f"--opd-teacher-url {self.opd_teacher_url} is no address. Give http://HOST:PORT of a vLLM server."
        if self.opd_kl_coef != 1.0 and not self.use_opd:
            yield f"--opd-kl-coef {self.opd_kl_coef} has no effect without --use-opd. Add that, or leave it out."
        if self.keep_old_actor and self.use_rollout_logprobs:
            yield "--keep-old-actor and --use-rollout-logprobs both say what the old policy is. Drop one of the two."
        if self.keep_old_actor and not self.wants_reward:
            yield f"--keep-old-actor has no part in --loss-type {self.loss_type}. Leave it out."
        if self.use_tis and self.use_rollout_logprobs:
            yield "--use-tis weighs by the trainer's over the engine's old policy, and --use-rollout-logprobs makes them one. Drop one of the two."
        if self.tis_clip_low > self.tis_clip:
            yield f"--tis-clip-low {self.tis_clip_low} is above --tis-clip {self.tis_clip}. Lower it."
        if not self.use_tis and (
            self.tis_clip,
            self.tis_clip_low,
            self.tis_level,
            self.tis_mode,
        ) != (2.0, 0.0, "token", "clip"):
            yield f"--tis-clip {self.tis_clip}, --tis-clip-low {self.tis_clip_low}, --tis-level {self.tis_level}, --tis-mode {self.tis_mode} have no effect without --use-tis. Add that, or leave them out."
        if self.tis_veto is not None and (not self.use_tis or self.custom_tis_path is not None):
            yield f"--tis-veto {self.tis_veto} is part of vime's own --use-tis. Add that, without --custom-tis-function-path, or leave it out."
        if self.loss_type == "custom_loss" and self.custom_loss_path is None:
            yield "--loss-type custom_loss needs a loss. Add --custom-loss-function-path, or choose policy_loss."
        hooks = {
            "--custom-loss-function-path": self.custom_loss_path,
            "--custom-advantage-function-path": self.custom_advantage_path,
        }
        for name, path in hooks.items():
            if path is not None and not self.wants_reward:
                yield f"{name} {path} has no part in --loss-type {self.loss_type}. Leave out one of the two."
        if self.custom_loss_path is not None and (self.use_tis or self.use_opsm):
            yield f"--custom-loss-function-path {self.custom_loss_path} takes the place of --use-tis and --use-opsm. Drop them, or the function."
        if self.custom_advantage_path is not None and self.kl_coef:
            yield f"--custom-advantage-function-path {self.custom_advantage_path} takes the place of --kl-coef {self.kl_coef}. Drop one of the two; the function is given both log-probabilities."
        if self.custom_tis_path is not None and not self.use_tis:
            yield f"--custom-tis-function-path {self.custom_tis_path} has no effect without --use-tis. Add that, or leave it out."
        if self.ref_update_interval is not None and not self.needs_reference:
            yield f"--ref-update-interval {self.ref_update_interval} has no reference to update. Add --use-kl-loss or --kl-coef, or leave it out."
        if self.overlong_buffer_len is None and self.overlong_penalty != 1.0:
            yield f"--overlong-penalty-factor {self.overlong_penalty} has no effect without --overlong-buffer-len. Add that, or leave it out."

    def _problems_of_the_estimator(self) -> Iterator[str]:
        name, estimator = f"--advantage-estimator {self.advantage_estimator}", self.estimator
        if not estimator.critic:
            with_critic = estimators_where(lambda e: e.critic)
            for flag_name, value, default in (
                ("--lambd", self.lambd, 1.0),
                ("--value-clip", self.value_clip, 0.2),
                ("--num-critic-only-steps", self.num_critic_only_steps, 0),
            ):
                if value != default:
                    yield f"{flag_name} {value} has no effect without a critic. Add --advantage-estimator {with_critic}, or leave it out."
        elif self.custom_advantage_path is not None:
            yield f"--custom-advantage-function-path {self.custom_advantage_path} gives the critic of {name} nothing to learn. Choose another estimator, or drop the function."
        if estimator.constant_weight and self.per_token_loss:
            yield f"--calculate-per-token-loss divides by the response tokens, and {name} by a constant. Drop one of the two."
        if estimator.constant_weight and self.custom_reducer_path is not None:
            yield f"--custom-pg-loss-reducer-function-path {self.custom_reducer_path} and {name} both set the weights. Drop one of the two."
        if estimator.nonnegative_rewards and self.overlong_buffer_len is not None:
            yield f"--overlong-buffer-len {self.overlong_buffer_len} takes rewards below 0, where {name} has no meaning. Drop one of the two."
