"""The vLLM engines of a run as Ray actors, and the router in front of them."""

from __future__ import annotations

import logging
from itertools import groupby
from typing import Any

import ray

from vime.backends.vllm.engine import VLLMEngine, engine_name, log_of
from vime.backends.vllm.router import Router
from vime.config import Config
from vime.errors import EngineError
from vime.ray.environment import remote
from vime.ray.placement_group import Placement, Slot
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
        self.owners = [self._owners(i) for i in range(cfg.cluster.num_engines)]
        self._starting = {i: self._start(i) for i in range(cfg.cluster.num_engines)}

    def _owners(self, index: int) -> list[Any]:
        """The actors that will own an engine's processes: one on each of its nodes."""
        return [self._owner(index, part) for part in range(len(self._parts(index)))]

    def _parts(self, index: int) -> list[list[Slot]]:
        """The slots of an engine on each of its nodes."""
        slots = self.placement.engines[index]
        return [list(held) for _, held in groupby(slots, key=lambda slot: slot.node.id)]

    def _owner(self, index: int, part: int) -> Any:
        parts = self._parts(index)
        first, *_ = slots = parts[part]
        node = first.node
        everywhere = [slot for engine in self.placement.engines for slot in engine]
        owner = remote(VLLMEngine, {}, **self.placement.options("engine", first))
        return owner.remote(
            self.cfg,
            index,
            [slot.device for slot in slots],
            host=node.address,
            part=part,
            num_parts=len(parts),
            workers=sum(slot.node.id == node.id for slot in everywhere),
        )

    def _start(self, index: int, url: str | None = None) -> list[ray.ObjectRef]:
        """The URL of an engine once it is healthy, from the owner of each of its parts."""
        owners = self.owners[index]
        meeting = owners[0].meet.remote(url) if len(owners) > 1 else None
        return [owner.start.remote(url, meeting) for owner in owners]

    def wait_until_started(self) -> None:
        """Returns when all engines and the router are healthy."""
        self.urls = self._wait(self._starting)
        self.router.start(self.urls)

    def lost(self) -> list[int]:
        """The engines that died or do not answer, also if only one part of them did."""
        checks = [[owner.check.remote() for owner in owners] for owners in self.owners]
        return [
            index
            for index, of_parts in enumerate(checks)
            if any([self._is_lost(index, part, check) for part, check in enumerate(of_parts)])
        ]

    def _is_lost(self, index: int, part: int, check: ray.ObjectRef) -> bool:
        name = engine_name(index, part)
        try:
            wait(check, what=f"{name} to answer", timeout_s=_CHECK_TIMEOUT_S)
        except (EngineError, TimeoutError, ray.exceptions.RayError) as error:
            reason = str(getattr(error, "cause", error)).partition(";")[0]
            if isinstance(error, ray.exceptions.RayActorError):
                reason = f"the owner of {name} died"
            log.warning("engine lost: %s (see %s)", reason, log_of(self.cfg, index, part))
            return True
        return False

    def restart(self, lost: list[int]) -> None:
        """Start these engines again, each at its URL, with the weights of --hf-checkpoint."""
        for index in lost:
            stops = [owner.stop.remote() for owner in self.owners[index]]
            for part, stop in enumerate(stops):
                try:
                    wait(stop, what=f"vLLM engine {index} to stop", timeout_s=_CHECK_TIMEOUT_S)
                except (TimeoutError, ray.exceptions.RayError):  # its owner is lost too
                    ray.kill(self.owners[index][part])
                    self.owners[index][part] = self._owner(index, part)
        self._wait({index: self._start(index, self.urls[index]) for index in lost})

    def _wait(self, starts: dict[int, list[ray.ObjectRef]]) -> list[str]:
        """The URLs of these engines, once all their parts have started."""
        what, timeout_s = f"{len(starts)} vLLM engines to start", self.cfg.engine.start_timeout_s
        names = [
            f"{engine_name(index, part)} on {slots[0].node.address}"
            for index in starts
            for part, slots in enumerate(self._parts(index))
        ]
        refs = [ref for parts in starts.values() for ref in parts]
        wait_all(refs, what=what, timeout_s=timeout_s, names=names)
        return ray.get([parts[0] for parts in starts.values()])

    def stop(self) -> None:
        """End the router and every engine, even if one fails to stop."""
        self.router.stop()
        stops = [owner.stop.remote() for owners in self.owners for owner in owners]
        wait_all(stops, what="the vLLM engines to stop", timeout_s=_STOP_TIMEOUT_S)
