"""The number of GPUs (on a machine without GPUs: CPU slots) that a run needs and Ray has."""

from __future__ import annotations

import os

from vime.config import Config
from vime.config.sections.cluster import ClusterConfig
from vime.platform import Platform, choose, current, has_cuda, named
from vime.ray.node_plan import Shape


def local_slots(cluster: ClusterConfig) -> int:
    """The CPU slots of a local Ray without GPUs: --cpu-slots, or the number of cores."""
    return cluster.cpu_slots or len(os.sched_getaffinity(0))


def joins_cluster() -> bool:
    """Whether the run joins the cluster of RAY_ADDRESS. Otherwise it starts a Ray of its own."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def choose_here(cfg: Config) -> list[str]:
    """Chooses the platform of --device for a run on this machine; a problem if it has no GPU."""
    device = cfg.cluster.device
    if device == "cuda" and not cfg.debug.dry_run and not has_cuda():
        return [
            "--device cuda: torch finds no GPU on this machine. Look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or leave the flag out to run on CPU."
        ]
    if device != "auto":
        choose(named(device))
    return []


def check_slots(cfg: Config) -> list[str]:
    """A problem if the run needs more slots than a Ray on this machine would have.

    The cluster of RAY_ADDRESS is checked by `vime.ray.cluster`. A dry run needs no slots.
    """
    platform = current()
    if cfg.debug.dry_run or joins_cluster():
        return []
    if (nodes := cfg.cluster.actor_num_nodes) > 1:
        return [
            f"--actor-num-nodes {nodes} needs a Ray cluster. Start one and set RAY_ADDRESS to its "
            "address (docs/clusters.md), or set --actor-num-nodes 1 to train on this machine alone."
        ]
    if platform.is_cuda:
        import torch

        slots = torch.cuda.device_count()
    else:
        slots = local_slots(cfg.cluster)
    return too_many(cfg, platform, slots) or _engines_over_nodes(cfg)


def _engines_over_nodes(cfg: Config) -> list[str]:
    cluster, shape = cfg.cluster, Shape.of(cfg)
    if shape.num_engines == 0 or shape.parts_per_engine == 1:
        return []
    return [
        f"--rollout-num-gpus-per-engine {cluster.gpus_per_engine} is more than --num-gpus-per-node "
        f"{cluster.gpus_per_node}, so an engine needs {shape.parts_per_engine} nodes of a Ray "
        "cluster. Start one and set RAY_ADDRESS to its address (docs/clusters.md), or raise "
        "--num-gpus-per-node if this machine has more."
    ]


def too_many(cfg: Config, platform: Platform, slots: float) -> list[str]:
    """A problem if the run needs more than `slots`."""
    cluster = cfg.cluster
    if cfg.total_gpus <= slots:
        return []
    asked = (
        f"--actor-num-nodes {cluster.actor_num_nodes} x --actor-num-gpus-per-node "
        f"{cluster.actor_gpus_per_node}"
    )
    if cfg.total_gpus > cluster.trainer_gpus:
        asked += f" + --rollout-num-gpus {cluster.rollout_gpus}"
    unit = "GPUs" if platform.is_cuda else "CPU slots (one stands for one GPU)"
    remedy = "Ask for fewer"
    if cfg.total_gpus > cluster.trainer_gpus:
        remedy += ", share them with --colocate"
    if not platform.is_cuda:
        remedy += ", or offer more with --cpu-slots"
    return [f"{asked} needs {cfg.total_gpus} {unit}, Ray has {slots:g}. {remedy}."]
