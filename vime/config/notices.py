"""What a user should know of settings that work, but maybe not as meant; nothing is refused."""

from __future__ import annotations

from vime.algorithms.advantages import estimators_where
from vime.config import Config
from vime.config.rules import VLLM_ROLLOUT


def notices(cfg: Config) -> list[str]:
    """What works, though not as the flags alone suggest. Printed once at the start."""
    cluster, batch, rollout = cfg.cluster, cfg.batch, cfg.rollout
    found = []
    if cluster.colocate and cluster.rollout_gpus_asked is not None:
        found.append(
            f"--rollout-num-gpus {cluster.rollout_gpus_asked} is ignored under --colocate: "
            f"generation uses the {cluster.rollout_gpus} GPUs that train."
        )
    if cfg.parallel.sequence_parallel and cfg.parallel.tp == 1:
        found.append(
            "--sequence-parallel is off: it divides work among tensor-parallel ranks, and "
            "--tensor-model-parallel-size is 1."
        )
    if batch.dynamic and batch.micro_batch_size != 1:
        found.append(
            f"--micro-batch-size {batch.micro_batch_size} is ignored under "
            "--use-dynamic-batch-size."
        )
    if batch.max_tokens_per_gpu is not None and not batch.dynamic:
        found.append(
            f"--max-tokens-per-gpu {batch.max_tokens_per_gpu} has no effect without "
            "--use-dynamic-batch-size."
        )
    if cfg.algorithm.needs_reference and cfg.checkpoint.ref_load is None:
        found.append(
            f"no --ref-load: the reference model is --hf-checkpoint {cfg.model.hf_checkpoint}."
        )
    if cfg.algorithm.wants_reward and (rollout.top_p < 1 or rollout.top_k > 0):
        found.append(
            f"--rollout-top-p {rollout.top_p} and --rollout-top-k {rollout.top_k} cut the sampled "
            "distribution, which the trainer does not see: expect a larger "
            "train/train_rollout_logprob_abs_diff."
        )
    if cfg.reward.rm_type and cfg.reward.custom_rm_path:
        found.append(
            f"--rm-type {cfg.reward.rm_type} grades nothing: --custom-rm-path "
            f"{cfg.reward.custom_rm_path} comes before it."
        )
    if _compares_an_answer_with_itself(cfg):
        found.append(
            "--n-samples-per-prompt 1 and --advantage-estimator "
            f"{cfg.algorithm.advantage_estimator}, which compares the answers to one prompt: every "
            "advantage will be 0. Give 8 samples, for example, or choose "
            f"{estimators_where(lambda e: not e.group_baseline)}."
        )
    if _relies_on_metadata_for_rewards(cfg):
        found.append(
            "no --rm-type or --custom-rm-path: every prompt must name its grader in metadata, as "
            '{"rm_type": ...}.'
        )
    return found


def _compares_an_answer_with_itself(cfg: Config) -> bool:
    a, rollout = cfg.algorithm, cfg.rollout
    own = rollout.custom_generate_path or rollout.convert_path or cfg.reward.post_process_path
    return (
        a.wants_reward
        and cfg.batch.samples_per_prompt == 1
        and a.estimator.group_baseline
        and a.normalize_rewards
        and a.custom_advantage_path is None
        and not a.use_opd
        and own is None
        and rollout.function_path == VLLM_ROLLOUT
    )


def _relies_on_metadata_for_rewards(cfg: Config) -> bool:
    return (
        cfg.algorithm.wants_reward
        and cfg.rollout.function_path == VLLM_ROLLOUT
        and cfg.rollout.custom_generate_path is None
        and cfg.reward.rm_type is None
        and cfg.reward.custom_rm_path is None
    )
