"""The checks before any process starts. Each check lists its problems: flag, value, remedy.

A check imports its library when it runs, so `--help` and the refusal of a wrong flag stay fast.
"""

import os
import sys

from vime.config import Config
from vime.config.plugins import check_plugins
from vime.config.sections.rollout import FULLY_ASYNC
from vime.data.checks import check_chat_template
from vime.ray.slots import check_slots, choose_here, joins_cluster


def find_own_code(cfg: Config) -> list[str]:
    """Puts --working-dir on the path: the checks that follow import the user's functions."""
    if folder := cfg.cluster.working_dir:
        sys.path.insert(0, os.path.abspath(folder))
    return []


def check_cluster(cfg: Config) -> list[str]:
    """Chooses GPUs or CPUs, and joins the cluster of RAY_ADDRESS, whose nodes decide it.

    The checks of the model need that decision, so they come later. A dry run joins nothing.
    """
    if cfg.debug.dry_run or not joins_cluster():
        return choose_here(cfg)
    from vime.ray import cluster

    cluster.join(cfg.cluster.working_dir, cfg.cluster.device)
    return []


def check_nodes(cfg: Config) -> list[str]:
    """Every node of the run shows that it can take part, after the checks of the driver itself."""
    if cfg.debug.dry_run or not joins_cluster():
        return []
    from vime.ray import cluster, node_check

    nodes, plan = cluster.planned(cfg)
    node_check.check_nodes(cfg, nodes, plan, cluster.driver_node())
    return []


def check_model(cfg: Config) -> list[str]:
    from vime.backends.megatron.hf.check import check_training

    return check_training(cfg)


def check_checkpoints(cfg: Config) -> list[str]:
    from vime.backends.megatron.checkpoints.start import check_start

    return check_start(cfg)


def check_engine_flags(cfg: Config) -> list[str]:
    from vime.backends.vllm.flags import check_vllm_flags

    return check_vllm_flags(cfg)


def check_graders(cfg: Config) -> list[str]:
    from vime.rollout.grading import check_rewards

    return check_rewards(cfg)


def check_served_teacher(cfg: Config) -> list[str]:
    if cfg.algorithm.opd_teacher_url is None:
        return []
    from vime.rollout.teacher import check_teacher

    return check_teacher(cfg)


def check_trackers(cfg: Config) -> list[str]:
    from vime.observe.trackers import missing_packages

    return missing_packages(use_tensorboard=cfg.log.use_tensorboard, use_wandb=cfg.log.use_wandb)


def check_one_ahead(cfg: Config) -> list[str]:
    """train_async.py generates and trains at the same time, which a shared GPU cannot do."""
    if not cfg.cluster.colocate or cfg.rollout.fully_async:
        return []
    return [
        "--colocate: train_async.py trains and generates at the same time. Leave it out and set "
        f"--rollout-num-gpus, add --rollout-function-path {FULLY_ASYNC}, or run train.py."
    ]


def check_synchronous(cfg: Config) -> list[str]:
    """train.py trains on whole rollouts, and changes weights between them."""
    if not cfg.rollout.fully_async:
        return []
    return [f"--rollout-function-path {FULLY_ASYNC} works with train_async.py. Run that."]


CHECKS = (
    find_own_code,
    check_cluster,
    check_model,
    check_checkpoints,
    check_chat_template,
    check_engine_flags,
    check_slots,
    check_plugins,
    check_graders,
    check_served_teacher,
    check_trackers,
    check_nodes,
)
