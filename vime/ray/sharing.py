"""Trainer and engines take turns on the GPUs that they share under --colocate.

The loop says whose turn it is, and this file moves the memory. Without shared GPUs nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from vime.config import Config
from vime.observe import Timers
from vime.platform import Platform
from vime.weight_sync.choice import engines_sleep, shares_gpus, trainer_offloads
from vime.weight_sync.together import call_each

# vLLM's sleep level that drops weights and caches. No copy is needed, because all weights are
# updated before the engines generate again.
DROP_EVERYTHING = 2


class SharedGpus:
    """
    train   calls a method of every trainer rank: `TrainerGroup.call` with its deadline
    timers  get perf/{sleep,wake_up,offload,onload}_time
    """

    def __init__(
        self, cfg: Config, train: Callable[..., Any], timers: Timers, *, on: Platform
    ) -> None:
        self.engines_sleep = engines_sleep(cfg, on)
        self.trainer_offloads = trainer_offloads(cfg, on)
        self.shared = shares_gpus(cfg, on)
        self.freezes = cfg.rollout.fully_async and self.shared and not self.engines_sleep
        self.timeout_s = cfg.engine.weight_transfer_timeout_s
        self.train = train
        self.timers = timers
        self.clients: list[Any] = []

    def engines_started(self, clients: list[Any]) -> None:
        """Engines start on an empty GPU, because they measure its memory. Then they go to sleep."""
        self.clients = clients
        self.sleep_engines()

    def sleep_engines(self) -> None:
        """Call this before training. Engines that sleep already stay asleep."""
        if self.engines_sleep:
            with self.timers("sleep"):
                self._every_engine(lambda c: c.sleep(DROP_EVERYTHING), "sleep")

    def free_trainer_memory(self) -> None:
        """Free all of the trainer's GPU memory, so that lost engines can start again."""
        self._offload(keep_weights=False)

    def trainer_started(self) -> None:
        self._offload(keep_weights=True)

    @contextmanager
    def for_training(self) -> Iterator[None]:
        """The engines sleep already. After the block the trainer keeps only weights on the GPU.

        Engines that never sleep stand still during the block, so that training has the whole GPU.
        """
        if self.trainer_offloads:
            with self.timers("onload"):
                self.train("onload")
        with self._engines_frozen() if self.freezes else nullcontext():
            yield
        self._offload(keep_weights=True)

    @contextmanager
    def _engines_frozen(self) -> Iterator[None]:
        self._every_engine(lambda c: c.pause("keep"), "pause")
        try:
            yield
        finally:
            self._every_engine(lambda c: c.resume(), "resume")

    @contextmanager
    def for_weight_update(self) -> Iterator[None]:
        """During the block both sides hold weights on the GPU; afterwards only the engines do."""
        self._wake_up("weights")
        yield
        self._offload(keep_weights=False)
        self._wake_up("kv_cache")

    def _wake_up(self, tag: str) -> None:
        if self.engines_sleep:
            with self.timers("wake_up"):
                self._every_engine(lambda c: c.wake_up((tag,)), f"wake up ({tag})")

    def _offload(self, *, keep_weights: bool) -> None:
        if self.trainer_offloads:
            with self.timers("offload"):
                self.train("offload", keep_weights)
        elif self.engines_sleep:  # the trainer's state stays; only its cached memory is freed
            with self.timers("offload"):
                self.train("free_cache")

    def _every_engine(self, call: Callable[[Any], Any], what: str) -> None:
        call_each(self.clients, call, self.timeout_s, what)
