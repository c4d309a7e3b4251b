"""The algorithm: advantages, the policy loss, the reference, corrections, the user's own parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from vime.algorithms.advantages import ESTIMATORS, Estimator, estimators_where
from vime.algorithms.kl import KL_TYPES
from vime.algorithms.off_policy import LEVELS, MODES
from vime.config.fields import Section, default_of, flag, flag_of
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

# The fields that act under sft_loss as well; all others act on a policy alone.
_OF_EVERY_LOSS = (
    "loss_type",
    "per_token_loss",
    "compute_advantages",
    "custom_reducer_path",
    "megatron_init_path",
    "model_provider_path",
    "before_train_step_path",
    "seed",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig(Section):
    loss_type: str = flag(
        "--loss-type",
        "policy_loss: reinforcement learning; sft_loss: supervised fine-tuning on given answers; "
        "custom_loss: reinforcement learning with the loss of --custom-loss-function-path",
        default="policy_loss",
        choices=("policy_loss", "sft_loss", "custom_loss"),
    )
    advantage_estimator: str = flag(
        "--advantage-estimator",
        "method that turns rewards into advantages",
        default="grpo",
        choices=tuple(ESTIMATORS),
    )
    use_kl_loss: bool = flag(
        "--use-kl-loss",
        "add the KL to the reference model to the loss, times --kl-loss-coef; also log it",
        default=False,
    )
    kl_loss_coef: float = flag(
        "--kl-loss-coef",
        "weight of the KL in the loss",
        default=0.0,
        at_least=0,
        only_with="--use-kl-loss",
    )
    kl_loss_type: str = flag(
        "--kl-loss-type", "estimator of the KL in the loss", default="k1", choices=tuple(KL_TYPES)
    )
    unbiased_kl: bool = flag(
        "--use-unbiased-kl",
        "multiply the KL loss by the ratio of new and old policy",
        default=False,
        only_with="--use-kl-loss",
    )
    kl_coef: float = flag(
        "--kl-coef",
        "weight of the KL to the reference model as a penalty on the reward",
        default=0.0,
        at_least=0,
    )
    use_opd: bool = flag(
        "--use-opd",
        "on-policy distillation: subtract the KL to a teacher from each token's advantage",
        default=False,
    )
    opd_type: str = flag(
        "--opd-type",
        "where the teacher runs. megatron: in the trainer's ranks, with the policy's architecture; "
        "vllm: behind a vLLM server, with the policy's vocabulary",
        default="megatron",
        choices=("megatron", "vllm"),
        only_with="--use-opd",
    )
    opd_teacher_url: str | None = flag(
        "--opd-teacher-url",
        "http://HOST:PORT of the teacher's server; without it, your own function sets "
        "Sample.teacher_log_probs",
        default=None,
        only_with="--use-opd --opd-type vllm",
    )
    opd_kl_coef: float = flag(
        "--opd-kl-coef",
        "weight of the KL to the teacher",
        default=1.0,
        above=0,
        only_with="--use-opd",
    )
    entropy_coef: float = flag(
        "--entropy-coef", "weight of the entropy bonus in the loss", default=0.0
    )
    clip_low: float = flag(
        "--eps-clip", "the ratio is clipped at 1 minus this", default=0.2, at_least=0
    )
    clip_high_asked: float | None = flag(
        "--eps-clip-high",
        "the ratio is clipped at 1 plus this",
        default=None,
        at_least=0,
        inherits="--eps-clip",
    )
    dual_clip: float | None = flag(
        "--eps-clip-c",
        "dual clip: with a negative advantage, the loss is at most this times |advantage|",
        default=None,
        above=1,
    )
    gamma: float = flag(
        "--gamma",
        "discount of later rewards; each token with loss is a step",
        default=1.0,
        at_least=0,
        at_most=1,
    )
    lambd: float = flag(
        "--lambd",
        "with a critic: lambda of GAE; at 1 the critic is only a baseline",
        default=1.0,
        at_least=0,
        at_most=1,
    )
    value_clip: float = flag(
        "--value-clip",
        "with a critic: a value that moves further than this from its value at the start of the "
        "rollout has no gradient",
        default=0.2,
        above=0,
    )
    num_critic_only_steps: int = flag(
        "--num-critic-only-steps",
        "with a critic: number of rollouts at the start that train only the critic",
        default=0,
        at_least=0,
    )
    per_token_loss: bool = flag(
        "--calculate-per-token-loss",
        "average the loss over all tokens of a step, not over samples",
        default=False,
    )
    normalize_advantages: bool = flag(
        "--normalize-advantages", "whiten advantages over the tokens of a step", default=False
    )
    grpo_std: bool = flag(
        "--grpo-std-normalization",
        "divide a group's scores by their standard deviation, where the estimator does",
        default=True,
        negated="--disable-grpo-std-normalization",
    )
    normalize_rewards: bool = flag(
        "--rewards-normalization",
        "turn rewards into scores relative to their group, where the estimator does",
        default=True,
        negated="--disable-rewards-normalization",
    )
    compute_advantages: bool = flag(
        "--compute-advantages-and-returns",
        "compute advantages; sft_loss never does",
        default=True,
        negated="--disable-compute-advantages-and-returns",
    )
    overlong_buffer_len: int | None = flag(
        "--overlong-buffer-len",
        "DAPO: the reward falls linearly with the number of tokens that a response uses of the last "
        "N tokens of --rollout-max-response-len",
        default=None,
        at_least=1,
    )
    overlong_penalty: float = flag(
        "--overlong-penalty-factor",
        "reward that a response of full length loses",
        default=1.0,
        above=0,
        only_with="--overlong-buffer-len",
    )
    use_rollout_logprobs: bool = flag(
        "--use-rollout-logprobs",
        "take the old policy's log-probabilities from the engine that sampled",
        default=False,
    )
    keep_old_actor: bool = flag(
        "--keep-old-actor",
        "compute the old policy's log-probabilities with a kept copy of the weights that generated",
        default=False,
    )
    use_tis: bool = flag(
        "--use-tis",
        "truncated importance sampling: weight the loss by the trainer's probability over the "
        "engine's",
        default=False,
    )
    tis_clip: float = flag(
        "--tis-clip", "largest weight", default=2.0, above=0, only_with="--use-tis"
    )
    tis_clip_low: float = flag(
        "--tis-clip-low", "smallest weight", default=0.0, at_least=0, only_with="--use-tis"
    )
    tis_level: str = flag(
        "--tis-level",
        "a weight for each token, for each sequence (product over its tokens), or the sequence's "
        "geometric mean",
        default="token",
        choices=tuple(LEVELS),
        only_with="--use-tis",
    )
    tis_mode: str = flag(
        "--tis-mode",
        "clip weights to the bounds, or mask tokens whose weight is out of bounds (with --tis-level "
        "token: IcePop)",
        default="clip",
        choices=tuple(MODES),
        only_with="--use-tis",
    )
    tis_veto: float | None = flag(
        "--tis-veto",
        "mask a sequence if the weight of any of its tokens is below this; for example 1e-4",
        default=None,
        above=0,
        at_most=1,
        only_with="--use-tis",
    )
    custom_tis_path: str | None = flag(
        "--custom-tis-function-path",
        "weights the loss in place of the --tis-* flags",
        default=None,
        only_with="--use-tis",
        hook=TIS,
    )
    custom_loss_path: str | None = flag(
        "--custom-loss-function-path",
        "computes the whole policy loss",
        default=None,
        hook=LOSS,
    )
    custom_advantage_path: str | None = flag(
        "--custom-advantage-function-path",
        "computes the advantages in place of --advantage-estimator",
        default=None,
        hook=ADVANTAGE,
    )
    custom_reducer_path: str | None = flag(
        "--custom-pg-loss-reducer-function-path",
        "computes each token's weight in the loss of its step",
        default=None,
        hook=REDUCER,
    )
    megatron_init_path: str | None = flag(
        "--custom-megatron-init-path",
        "runs in every trainer rank after the ranks connect and before the model is built",
        default=None,
        hook=INIT,
    )
    model_provider_path: str | None = flag(
        "--custom-model-provider-path",
        "changes a chunk of Megatron's model, or returns another chunk with the same weight names",
        default=None,
        hook=MODEL,
    )
    before_log_probs_path: str | None = flag(
        "--custom-megatron-before-log-prob-hook-path",
        "runs before a pass for log-probabilities; store_prefix is 'ref_' for the reference and "
        "'teacher_' for the teacher",
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
        "copy the actor into the reference model after every N rollouts (default: never)",
        default=None,
        at_least=1,
    )
    use_opsm: bool = flag(
        "--use-opsm",
        "mask sequences with a negative advantage that the new policy makes less likely; see "
        "--opsm-delta",
        default=False,
    )
    opsm_delta: float = flag(
        "--opsm-delta",
        "mask a sequence with negative advantage when its mean (old - new log-probability) "
        "exceeds this",
        default=1e-4,
        at_least=0,
        only_with="--use-opsm",
    )
    mismatch_metrics: bool = flag(
        "--get-mismatch-metrics",
        "log train/mismatch_*: the distance between the trainer's and the engine's probabilities",
        default=False,
    )
    seed: int = flag("--seed", "seed of the trainer and the engines", default=1234)

    @property
    def estimator(self) -> Estimator:
        return ESTIMATORS[self.advantage_estimator]

    @property
    def needs_reward(self) -> bool:
        """Whether the policy learns from its own samples; sft_loss learns from given answers."""
        return self.loss_type != "sft_loss"

    @property
    def flags_that_sft_ignores(self) -> list[str]:
        """The flags that change only a policy's training and have values other than the default."""
        found = []
        for f in fields(self):
            value, spec = getattr(self, f.name), flag_of(f)
            weighs = f.name == "advantage_estimator" and self.estimator.constant_weight
            if spec and f.name not in _OF_EVERY_LOSS and value != default_of(f) and not weighs:
                switch = spec.name if value is True else str(spec.negated)
                found.append(switch if isinstance(value, bool) else f"{spec.name} {value}")
        return found

    @property
    def needs_rollout_logp(self) -> str | None:
        """The first flag in force that needs the engine's log-probabilities; None if none does."""
        if not self.needs_reward:
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
        return self.needs_reward and (self.use_kl_loss or self.kl_coef != 0.0)

    @property
    def needs_teacher(self) -> bool:
        """Whether the trainer's ranks hold a teacher."""
        return self.needs_reward and self.use_opd and self.opd_type == "megatron"

    @property
    def needs_teacher_logp(self) -> bool:
        """Whether samples must have a teacher's log-probabilities."""
        return self.needs_reward and self.use_opd and self.opd_type == "vllm"

    @property
    def needs_critic(self) -> bool:
        return self.needs_reward and self.estimator.critic

    def problems(self) -> Iterator[str]:
        if self.advantage_estimator in ESTIMATORS:
            yield from self._problems_of_the_estimator()
        yield from self._problems_of_the_loss()
        yield from self._problems_of_the_old_policy()
        if self.kl_coef and self.kl_loss_coef:
            yield (
                f"--kl-coef {self.kl_coef} and --kl-loss-coef {self.kl_loss_coef} exclude each "
                "other: the first is a penalty on the reward, the second a loss. Set one to 0."
            )
        url = self.opd_teacher_url
        if url is not None and not url.startswith(("http://", "https://")):
            yield (
                f"--opd-teacher-url {url} is not an address. Give http://HOST:PORT of a vLLM "
                "server."
            )
        if self.ref_update_interval is not None and not self.needs_reference:
            yield (
                f"--ref-update-interval {self.ref_update_interval} needs a reference model. Add "
                "--use-kl-loss or --kl-coef, or leave it out."
            )

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
                    yield (
                        f"{flag_name} {value} has no effect without a critic. Add "
                        f"--advantage-estimator {with_critic}, or leave it out."
                    )
        if self.gamma != 1.0 and not estimator.uses_gamma and self.custom_advantage_path is None:
            yield (
                f"--gamma {self.gamma} has no effect under {name}, which does not discount. Add "
                f"--advantage-estimator {estimators_where(lambda e: e.uses_gamma)}, or leave it "
                "out."
            )
        if self.dual_clip is not None and not estimator.dual_clip and self.custom_loss_path is None:
            yield (
                f"--eps-clip-c {self.dual_clip} has no effect under {name}, whose loss has no dual "
                "clip. Choose another estimator, or leave it out."
            )
        if estimator.critic and self.custom_advantage_path is not None:
            yield (
                f"--custom-advantage-function-path {self.custom_advantage_path} leaves the critic "
                f"of {name} without a target. Choose another estimator, or drop the function."
            )
        if estimator.constant_weight and self.per_token_loss:
            yield (
                "--calculate-per-token-loss divides by the number of response tokens, and "
                f"{name} divides by a constant. Drop one of the two."
            )
        if estimator.constant_weight and self.custom_reducer_path is not None:
            yield (
                f"--custom-pg-loss-reducer-function-path {self.custom_reducer_path} and {name} "
                "both set the weights of tokens. Drop one of the two."
            )
        if estimator.nonnegative_rewards and self.overlong_buffer_len is not None:
            yield (
                f"--overlong-buffer-len {self.overlong_buffer_len} makes rewards negative, and "
                f"{name} is not defined for negative rewards. Drop one of the two."
            )

    def _problems_of_the_loss(self) -> Iterator[str]:
        if not self.compute_advantages and self.needs_reward:
            yield (
                f"--disable-compute-advantages-and-returns leaves --loss-type {self.loss_type} "
                "nothing to learn from. Leave it out."
            )
        if self.loss_type == "custom_loss" and self.custom_loss_path is None:
            yield (
                "--loss-type custom_loss needs a loss. Add --custom-loss-function-path, or choose "
                "policy_loss."
            )
        if not self.needs_reward:
            policys_own = {
                "--use-opd": self.use_opd or None,
                "--keep-old-actor": self.keep_old_actor or None,
                "--custom-loss-function-path": self.custom_loss_path,
                "--custom-advantage-function-path": self.custom_advantage_path,
            }
            for name, value in policys_own.items():
                if value is not None:
                    said = name if value is True else f"{name} {value}"
                    yield (
                        f"{said} has no effect with --loss-type {self.loss_type}. Leave out one "
                        "of the two."
                    )
        if self.custom_loss_path is not None and (self.use_tis or self.use_opsm):
            yield (
                f"--custom-loss-function-path {self.custom_loss_path} replaces the loss that "
                "--use-tis and --use-opsm change. Drop these two flags, or the function."
            )
        if self.custom_advantage_path is not None and self.kl_coef:
            yield (
                f"--custom-advantage-function-path {self.custom_advantage_path} replaces "
                f"--kl-coef {self.kl_coef}. Drop one of the two; the function receives both "
                "log-probabilities."
            )

    def _problems_of_the_old_policy(self) -> Iterator[str]:
        if self.keep_old_actor and self.use_rollout_logprobs:
            yield (
                "--keep-old-actor and --use-rollout-logprobs choose different old policies. Drop "
                "one of the two."
            )
        if self.use_tis and self.use_rollout_logprobs:
            yield (
                "--use-tis corrects the difference between the trainer's old policy and the "
                "engine's, and --use-rollout-logprobs makes them equal. Drop one of the two."
            )
        if self.tis_clip_low > self.tis_clip:
            yield (
                f"--tis-clip-low {self.tis_clip_low} is above --tis-clip {self.tis_clip}. Lower it."
            )
        if self.tis_veto is not None and self.custom_tis_path is not None:
            yield (
                f"--tis-veto {self.tis_veto} has no effect with --custom-tis-function-path "
                f"{self.custom_tis_path}. Leave out one of the two."
            )
