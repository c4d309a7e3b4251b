"""The checks before any process starts. Each lists its problems: flag, value, remedy."""

from vime.backends.megatron.checkpoints.start import check_start
from vime.backends.megatron.hf.check import check_training
from vime.backends.vllm.flags import check_vllm_flags
from vime.config import Config
from vime.config.plugins import check_plugins
from vime.data.checks import check_chat_template
from vime.observe.trackers import missing_packages
from vime.ray.placement_group import check_slots
from vime.rollout.grading import check_rewards
from vime.rollout.teacher import check_teacher


def check_trackers(cfg: Config) -> list[str]:
    return missing_packages(use_tensorboard=cfg.log.use_tensorboard, use_wandb=cfg.log.use_wandb)


def check_decoupled(cfg: Config) -> list[str]:
    """train_async.py generates and trains at the same time, which a shared GPU cannot do."""
    if not cfg.cluster.colocate:
        return []
    return [
        "--colocate: train_async.py trains and generates at the same time. "
        "Drop it and set --rollout-num-gpus, or run train.py."
    ]


CHECKS = (
    check_training,
    check_start,
    check_chat_template,
    check_vllm_flags,
    check_slots,
    check_plugins,
    check_rewards,
    check_teacher,
    check_trackers,
)
