"""The training ranks as Ray actors, called together."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray

from vime.addresses import LOOPBACK
from vime.config import Config
from vime.observe import spans
from vime.platform import current
from vime.ray.environment import remote
from vime.ray.placement_group import Placement, Slot
from vime.ray.wait import stacks_if_longer_than, wait, wait_all
from vime.rendezvous import interface_variables, listening_store


class TrainerRank:
    """One rank. Only its own process imports Megatron, so the driver stays light.

    host  this node's address, at which other ranks reach this one
    """

    def __init__(self, rank: int, host: str = LOOPBACK) -> None:
        self.rank = rank
        self.host = host
        self.store: Any = None
        self.trainer: Any = None

    def open_store(self, timeout_s: float) -> tuple[str, int]:
        """The address and the port at which all ranks meet. Rank 0 listens there from now on."""
        self.store = listening_store(self.host, timeout_s)
        return self.host, self.store.port

    def prepare(self) -> None:
        """Import Megatron. This takes seconds but no GPU, so it runs while engines start."""
        from vime.backends.megatron import compat

        compat.apply()
        import vime.backends.megatron.model.build  # noqa: F401

    def start(
        self, cfg: Config, world_size: int, address: str, port: int, timeout_s: float
    ) -> tuple[int, int]:
        """Build the trainer and load its checkpoint.

        Returns the first rollout to train on, and the data-parallel rank.
        """
        from vime.backends.megatron.memory.in_use import memory_remedy
        from vime.backends.megatron.trainer import MegatronTrainer

        self._keep_log(cfg)
        if cfg.log.timeline:
            spans.record(cfg.log.run_dir, f"trainer-{self.rank}")
        os.environ.update(interface_variables(self.host, os.environ))
        with stacks_if_longer_than(timeout_s), memory_remedy(cfg), spans.span("start"):
            # Ray shows each actor only its own GPU, so the local rank is always 0.
            self.trainer = MegatronTrainer(
                cfg, self.rank, world_size, 0, address, port, self.store, self.host
            )
        return self.trainer.start_rollout_id, self.trainer.dp_rank

    def _keep_log(self, cfg: Config) -> None:
        """Write logs/trainer-RANK.log in the run's folder, beside the logs of the engines."""
        folder = Path(cfg.log.run_dir) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        kept = logging.FileHandler(folder / f"trainer-{self.rank}.log")
        kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        shown = logging.StreamHandler()
        shown.setLevel(logging.WARNING)
        logger = logging.getLogger("vime")
        logger.setLevel(logging.INFO)
        for handler in (kept, shown):
            logger.addHandler(handler)

    def call(self, method: str, timeout_s: float, *args: Any) -> Any:
        try:
            with stacks_if_longer_than(timeout_s), _span(method, *args):
                return getattr(self.trainer, method)(*args)
        finally:
            spans.flush()  # at the end of the run, Ray ends this process at once


def _span(method: str, *args: Any) -> AbstractContextManager[None]:
    """The span of a call, with the rollout or the version that it is about."""
    subject = getattr(args[0], "rollout_id", args[0]) if args else None
    about = {"of": subject} if isinstance(subject, int | str) else {}
    return spans.span(method.replace("_", " "), **about)


class TrainerGroup:
    """All ranks of the policy's trainer."""

    def __init__(self, cfg: Config, placement: Placement) -> None:
        self.cfg = cfg
        self.num_ranks = len(placement.trainers)
        slots = enumerate(placement.trainers)
        self.names = [f"rank {rank} on {slot.node.address}" for rank, slot in slots]
        self.ranks = [self._rank(placement, rank) for rank in range(self.num_ranks)]
        for rank in self.ranks:
            rank.prepare.remote()  # not awaited: an error here occurs again in `start`

    def _rank(self, placement: Placement, rank: int) -> Any:
        """The actor of a rank."""
        slot = placement.trainers[rank]
        ours = _gpu_environment() if current().is_cuda else _cpu_environment(slot, placement)
        env = {**ours, **self.cfg.cluster.train_env_vars}
        actor = remote(TrainerRank, env, **placement.options("trainer", slot))
        return actor.remote(rank, slot.node.address)

    def start(self) -> int:
        """Start every rank. Returns the first rollout to train on."""
        timeout_s = self.cfg.engine.start_timeout_s
        address, port = wait(
            self.ranks[0].open_store.remote(timeout_s), what="trainer rank 0", timeout_s=timeout_s
        )
        refs = [
            r.start.remote(self.cfg, self.num_ranks, address, port, timeout_s) for r in self.ranks
        ]
        what = f"{self.num_ranks} trainer ranks to start"
        started = wait_all(refs, what=what, timeout_s=timeout_s, names=self.names)
        self.dp_ranks = [dp_rank for _, dp_rank in started]
        return started[0][0]

    def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call `MegatronTrainer.method(*args)` on every rank. Returns rank 0's answer."""
        return self._call(method, [args] * self.num_ranks, timeout_s)

    def train(self, parts: list[ray.ObjectRef], *, timeout_s: float) -> dict[str, float]:
        """All optimizer steps of one rollout. Each rank gets its own part of the batch only.

        parts  `RankBatch`es by data-parallel rank
        """
        return self._call("train", [(parts[dp_rank],) for dp_rank in self.dp_ranks], timeout_s)

    def _call(self, method: str, args_by_rank: list[tuple], timeout_s: float) -> Any:
        refs = [
            rank.call.remote(method, timeout_s - 5, *args)
            for rank, args in zip(self.ranks, args_by_rank, strict=True)
        ]
        what = f"{self.num_ranks} trainer ranks to {method}"
        return wait_all(refs, what=what, timeout_s=timeout_s, names=self.names)[0]


def _cpu_environment(slot: Slot, placement: Placement) -> dict[str, str]:
    """The ranks of a node divide its cores, unless the user has set OMP_NUM_THREADS.

    Idle threads sleep instead of spinning, because engines and graders need the cores too.
    """
    num_ranks = sum(other.node == slot.node for other in placement.trainers)
    threads = max(1, slot.node.cores // num_ranks)
    return {
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def _gpu_environment() -> dict[str, str]:
    """Eight threads pin host memory, because offloaded state needs gigabytes of it."""
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ:
        return {}
    settings = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
    return {"PYTORCH_CUDA_ALLOC_CONF": settings}
