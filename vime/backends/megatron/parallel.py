"""Connects this process to the other ranks: collectives, Megatron's groups, seeds."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vime import platform
from vime.addresses import LOOPBACK
from vime.backends.megatron import compat
from vime.config import Config


def initialize_parallel(
    cfg: Config,
    rank: int,
    world_size: int,
    local_rank: int = 0,
    master_address: str = LOOPBACK,
    master_port: int = 0,
    store: dist.TCPStore | None = None,
) -> None:
    """Applies the compat patches, starts torch.distributed, then calls `initialize_groups`.

    Every collective has the deadline --distributed-timeout-minutes.

    master_port  the port of rank 0's store; 0 (any) for a world of one
    store        on rank 0, the store that listens there already, if it does: `listening_store`
    """
    compat.apply()
    here = platform.current()
    if here.is_cuda:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(local_rank)
    timeout = timedelta(minutes=cfg.cluster.distributed_timeout_minutes)
    if store is None:
        torchrun_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        hosts = rank == 0 and not torchrun_hosts_store
        store = dist.TCPStore(
            master_address, master_port, world_size, is_master=hosts, timeout=timeout
        )
    else:
        store.set_timeout(timeout)
    dist.init_process_group(
        here.collectives,
        store=dist.PrefixStore("vime", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    initialize_groups(cfg)


def initialize_groups(cfg: Config) -> None:
    """Makes Megatron's process groups from `cfg.parallel`, and seeds. A collective.

    The groups replace existing ones.
    """
    from megatron.core import parallel_state as mpu

    p = cfg.parallel
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
        distributed_timeout_minutes=max(1, round(cfg.cluster.distributed_timeout_minutes)),
    )
    seed_everything(cfg.algorithm.seed + 100 * mpu.get_pipeline_model_parallel_rank())


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy, torch and Megatron's tensor-parallel random states.

    Megatron's groups must exist.
    """
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown_parallel() -> None:
    """Leaves the process groups. Safe to call twice."""
    if dist.is_initialized():
        from megatron.core import parallel_state as mpu

        mpu.destroy_model_parallel()
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Place:
    """This rank's position on one axis of the layout, and the process group of that axis."""

    rank: int
    size: int
    group: Any


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank's place in every group whose ranks divide the weights."""

    tensor: Place
    expert_tensor: Place
    expert: Place
    pipeline: Place

    @classmethod
    def current(cls) -> Ranks:
        """Reads Megatron's groups, which must exist."""
        from megatron.core import parallel_state as mpu

        def place(group: Any) -> Place:
            return Place(dist.get_rank(group), dist.get_world_size(group), group)

        return cls(
            tensor=place(mpu.get_tensor_model_parallel_group()),
            expert_tensor=place(mpu.get_expert_tensor_parallel_group()),
            expert=place(mpu.get_expert_model_parallel_group()),
            pipeline=place(mpu.get_pipeline_model_parallel_group()),
        )
