"""Notices about settings that work, but perhaps not as the user expects. They refuse nothing."""

from __future__ import annotations

from collections.abc import Iterator

from vime.algorithms.advantages import estimators_where
from vime.config import Config
from vime.config.sections.rollout import ENGINE_ROLLOUTS


def notices(cfg: Config) -> list[str]:
    """The notices of a run, which prints them once at the start."""
    cluster, batch, rollout = cfg.cluster, cfg.batch, cfg.rollout
    found = []
    if cluster.colocate and cluster.rollout_gpus_asked is not None:
        found.append(
            f"--rollout-num-gpus {cluster.rollout_gpus_asked} is ignored with --colocate: "
            f"the {cluster.rollout_gpus} GPUs that train also generate."
        )
    if cfg.parallel.sequence_parallel and cfg.parallel.tp == 1:
        found.append(
            "--sequence-parallel is off: it divides tokens among tensor-parallel ranks, and "
            "--tensor-model-parallel-size is 1."
        )
    if batch.dynamic and batch.micro_batch_size != 1:
        found.append(
            f"--micro-batch-size {batch.micro_batch_size} is ignored with --use-dynamic-batch-size."
        )
    if batch.max_tokens_per_gpu is not None and not batch.dynamic:
        found.append(
            f"--max-tokens-per-gpu {batch.max_tokens_per_gpu} has no effect without "
            "--use-dynamic-batch-size."
        )
    if cfg.algorithm.needs_reference and cfg.checkpoint.ref_load is None:
        found.append(
            "--ref-load is not given: the reference model is --hf-checkpoint "
            f"{cfg.model.hf_checkpoint}."
        )
    if cfg.algorithm.needs_reward and (rollout.top_p < 1 or rollout.top_k > 0):
        found.append(
            f"--rollout-top-p {rollout.top_p} and --rollout-top-k {rollout.top_k} exclude tokens "
            "from sampling, and the trainer's probabilities do not: expect a larger "
            "train/train_rollout_logprob_abs_diff."
        )
    if cfg.reward.rm_type and cfg.reward.custom_rm_path:
        found.append(
            f"--rm-type {cfg.reward.rm_type} is ignored: --custom-rm-path "
            f"{cfg.reward.custom_rm_path} grades instead."
        )
    if cfg.takes_old_policy_from_engine:
        found.append(
            "the old policy's log-probabilities come from the engine (--use-rollout-logprobs), "
            "because the weights change during a response. --use-tis computes them again and "
            "corrects the difference."
        )
    found += _of_the_algorithm(cfg)
    if _compares_single_answers(cfg):
        found.append(
            f"--advantage-estimator {cfg.algorithm.advantage_estimator} compares the answers to "
            "one prompt, and --n-samples-per-prompt is 1: every advantage will be 0. Give 8 "
            f"samples, for example, or choose {estimators_where(lambda e: not e.group_baseline)}."
        )
    if _relies_on_metadata_for_rewards(cfg):
        found.append(
            "neither --rm-type nor --custom-rm-path is given: every prompt must name its grader in "
            'its metadata, as {"rm_type": ...}.'
        )
    return found


def _of_the_algorithm(cfg: Config) -> Iterator[str]:
    """Flags of the algorithm that have no effect with the other flags of the run."""
    a = cfg.algorithm
    if not a.needs_reward:
        if ignored := a.flags_that_sft_ignores:
            yield f"--loss-type {a.loss_type} ignores {', '.join(ignored)}."
        return
    estimator, name = a.estimator, f"--advantage-estimator {a.advantage_estimator}"
    if a.kl_loss_type != "k1" and not a.use_kl_loss:
        yield f"--kl-loss-type {a.kl_loss_type} has no effect without --use-kl-loss."
    if not a.normalize_rewards and not estimator.group_baseline:
        yield f"--disable-rewards-normalization has no effect with {name}, which has no baseline."
    if not a.grpo_std and (estimator.without_std is None or not a.normalize_rewards):
        why = f"with {name}, which does not divide by the standard deviation"
        if estimator.without_std is not None:
            why = "with --disable-rewards-normalization"
        yield f"--disable-grpo-std-normalization has no effect {why}."
    if a.normalize_advantages and estimator.whiten and a.custom_advantage_path is None:
        yield f"--normalize-advantages has no effect with {name}, which always whitens."
    if a.overlong_buffer_len is not None and cfg.reward.post_process_path:
        yield (
            f"--overlong-buffer-len {a.overlong_buffer_len} has no effect: "
            f"--custom-reward-post-process-path {cfg.reward.post_process_path} makes the scores."
        )


def _compares_single_answers(cfg: Config) -> bool:
    a, rollout = cfg.algorithm, cfg.rollout
    own = rollout.custom_generate_path or rollout.convert_path or cfg.reward.post_process_path
    return (
        a.needs_reward
        and cfg.batch.samples_per_prompt == 1
        and a.estimator.group_baseline
        and a.normalize_rewards
        and a.custom_advantage_path is None
        and not a.use_opd
        and own is None
        and rollout.function_path in ENGINE_ROLLOUTS
    )


def _relies_on_metadata_for_rewards(cfg: Config) -> bool:
    return (
        cfg.algorithm.needs_reward
        and cfg.rollout.function_path in ENGINE_ROLLOUTS
        and cfg.rollout.custom_generate_path is None
        and cfg.reward.rm_type is None
        and cfg.reward.custom_rm_path is None
    )
