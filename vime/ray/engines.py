"""The vLLM engines of a run as Ray actors, and the router in front of them."""

from __future__ import annotations

import logging
from typing import Any

import ray

from vime.backends.vllm.engine import VLLMEngine, logs_dir
from vime.backends.vllm.router import Router
from vime.config import Config
from vime.errors import EngineError
from vime.ray.environment import remote
from vime.ray.placement_group import Placement
from vime.ray.wait import wait, wait_all

log = logging.getLogger(__name__)

_CHECK_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0


class EngineGroup:
    """The constructor begins to start the engines. Call `wait_until_started` next."""

    def __init__(self, cfg: Config, placement: Placement) -> None:
        self.cfg = cfg
        self.placement = placement
        self.router = Router(cfg, host=placement.driver.address)
        self.urls: list[str] = []
        self.owners = [self._owner(i) for i in range(cfg.cluster.num_engines)]
        self._starting = [owner.start.remote() for owner in self.owners]

    def _owner(self, index: int) -> Any:
        """The actor that will own an engine's server."""
        slots = self.placement.engines[index]
        owner = remote(VLLMEngine, {}, **self.placement.options("engine", slots[0]))
        devices = [slot.device for slot in slots]
        return owner.remote(self.cfg, index, devices, host=slots[0].node.address)

    def wait_until_started(self) -> None:
        """Returns when all engines and the router are healthy."""
        self.urls = self._wait(self._starting)
        self.router.start(self.urls)

    def lost(self) -> list[int]:
        """The engines that died or do not answer."""
        checks, lost = [owner.check.remote() for owner in self.owners], []
        for index, check in enumerate(checks):
            try:
                wait(check, what=f"vLLM engine {index} to answer", timeout_s=_CHECK_TIMEOUT_S)
            except (EngineError, TimeoutError, ray.exceptions.RayError) as error:
                reason = str(getattr(error, "cause", error)).partition(";")[0]
                if isinstance(error, ray.exceptions.RayActorError):
                    reason = f"the owner of vLLM engine {index} died"
                where = logs_dir(self.cfg) / f"engine-{index}.log"
                log.warning("engine lost: %s (see %s)", reason, where)
                lost.append(index)
        return lost

    def restart(self, lost: list[int]) -> None:
        """Start these engines again, each at its URL, with the weights of --hf-checkpoint."""
        for index in lost:
            stop = self.owners[index].stop.remote()
            try:
                wait(stop, what=f"vLLM engine {index} to stop", timeout_s=_CHECK_TIMEOUT_S)
            except (TimeoutError, ray.exceptions.RayError):  # its owner is lost too
                ray.kill(self.owners[index])
                self.owners[index] = self._owner(index)
        self._wait([self.owners[index].start.remote(self.urls[index]) for index in lost])

    def _wait(self, starts: list[ray.ObjectRef]) -> list[str]:
        what, timeout_s = f"{len(starts)} vLLM engines to start", self.cfg.engine.start_timeout_s
        return wait_all(starts, what=what, timeout_s=timeout_s)

    def stop(self) -> None:
        """End the router and every engine, even if one fails to stop."""
        self.router.stop()
        stops = [owner.stop.remote() for owner in self.owners]
        wait_all(stops, what="the vLLM engines to stop", timeout_s=_STOP_TIMEOUT_S)
