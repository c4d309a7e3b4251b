"""Trainer and engines take turns on the GPUs that they share under --colocate.

At any time one of them has the memory. The loop names whose turn it is; the moves are here, and on
GPUs of their own, or without GPUs, there is nothing to move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vime.config import Config
from vime.observe import Timers
from vime.weight_sync.together import run_together

# vLLM drops weights and caches: every turn of the engines begins with an update of all weights.
DROP_EVERYTHING = 2


class SharedGpus:
    """
    train   calls a method of every trainer rank: `TrainerGroup.call` with its deadline
    timers  take perf/{sleep,wake_up,offload,onload}_time
    """

    def __init__(
        self, cfg: Config, train: Callable[..., Any], timers: Timers, *, on_gpus: bool
    ) -> None:
        self.engines_yield = on_gpus and cfg.cluster.offload_rollout
        self.trainer_yields = on_gpus and cfg.cluster.offload_train
        self.timeout_s = cfg.engine.weight_transfer_timeout_s
        self.train = train
        self.timers = timers
        self.clients: list[Any] = []

    def engines_started(self, clients: list[Any]) -> None:
        """Engines start on an empty GPU, whose memory they measure, and make room at once."""
        self.clients = clients
        self.rest_engines()

    def rest_engines(self) -> None:
        """Before training. Engines that sleep already stay as they are."""
        if self.engines_yield:
            with self.timers("sleep"):
                self._every_engine(lambda c: c.sleep(DROP_EVERYTHING), "sleep")

    def room_for_engines(self) -> None:
        """For engines that start again, at any time: the trainer is away with all that it has."""
        self._offload(keep_weights=False)

    def trainer_started(self) -> None:
        self._offload(keep_weights=True)

    @contextmanager
    def for_training(self) -> Iterator[None]:
        """With engines at rest the memory is the trainer's; after, it keeps its weights to send."""
        if self.trainer_yields:
            with self.timers("onload"):
                self.train("onload")
        yield
        self._offload(keep_weights=True)

    @contextmanager
    def for_weight_update(self) -> Iterator[None]:
        """Inside, both sides have their weights; after, the memory is the engines'."""
        self._wake_up("weights")
        yield
        self._offload(keep_weights=False)
        self._wake_up("kv_cache")

    def _wake_up(self, tag: str) -> None:
        if self.engines_yield:
            with self.timers("wake_up"):
                self._every_engine(lambda c: c.wake_up((tag,)), f"wake up ({tag})")

    def _offload(self, *, keep_weights: bool) -> None:
        if self.trainer_yields:
            with self.timers("offload"):
                self.train("offload", keep_weights)
        elif self.engines_yield:  # state stays; what training only borrowed does not
            with self.timers("offload"):
                self.train("free_cache")

    def _every_engine(self, call: Callable[[Any], Any], what: str) -> None:
        run_together([lambda c=c: call(c) for c in self.clients], self.timeout_s, what)
