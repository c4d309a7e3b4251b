"""The choices that trainer and engines share: the transport, and who leaves the GPU when."""

from __future__ import annotations

from vime.config import Config
from vime.platform import Platform

NODE = "VIME_NODE"  # environment variable of an engine: the address of its node


def transport_name(cfg: Config, on: Platform) -> str:
    """The transport of weights: "ipc" or "shm" on shared devices, else "nccl" or "gloo"."""
    if cfg.cluster.colocate:
        return "ipc" if on.is_cuda else "shm"
    return on.collectives


def shares_gpus(cfg: Config, on: Platform) -> bool:
    """Whether this run has a trainer and engines on the same GPUs."""
    alone = cfg.debug.rollout_only or cfg.debug.no_engines
    return on.is_cuda and cfg.cluster.colocate and not alone


def engines_sleep(cfg: Config, on: Platform) -> bool:
    """Whether engines give up their GPU memory while the trainer works.

    They get the weights back before an update and their KV caches after it.
    """
    return shares_gpus(cfg, on) and cfg.cluster.offload_rollout


def trainer_offloads(cfg: Config, on: Platform) -> bool:
    """Whether the trainer moves its state to host memory while engines generate."""
    return shares_gpus(cfg, on) and cfg.cluster.offload_train
