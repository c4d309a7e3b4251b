"""How a bucket of weights reaches every engine: the base of all transports.

Each transport has a counterpart inside the engines: `backends/vllm/plugin_receivers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch.distributed as dist

from vime.weight_sync import wire
from vime.weight_sync.together import InFlight, run_together


class Client(Protocol):
    """The calls to one engine that a transport makes."""

    url: str

    def world_size(self) -> int: ...
    def init_weight_transfer(self, init_info: dict[str, Any]) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...


class Transport:
    """Call `meet` and `connect` once. In each update, call `send` for every bucket, then `flush`.

    every_rank_sends  whether all trainer ranks call `send` and `flush`, or rank 0 alone; known
                      after `meet`
    under_way         the call that must end before engines get the next bucket: their pause, or
                      the previous bucket
    """

    every_rank_sends = False

    def __init__(self, clients: list[Client], timeout_s: float) -> None:
        self.clients = clients
        self.timeout_s = timeout_s
        self.under_way = InFlight()

    def meet(self) -> None:
        """All trainer ranks call this, before rank 0 calls `connect`."""

    def connect(self) -> None:
        for client in self.clients:
            client.init_weight_transfer({})

    def send(self, bucket: list[wire.Named]) -> int:
        """Returns the bucket's bytes, maybe before the engines have loaded it."""
        raise NotImplementedError

    def skip(self) -> None:
        """Called in place of `send` after the update has failed: no engine gets this bucket."""

    def flush(self) -> None:
        """Returns when every engine has loaded every bucket. May be called twice."""
        self.under_way.wait()

    def close(self) -> None:
        pass

    def update(self, info: dict[str, Any], *meanwhile: Callable[[], Any]) -> None:
        """Let every engine load a bucket while the other calls run. Returns when all are done."""
        loads = [partial(client.update_weights, info) for client in self.clients]
        run_together([*loads, *meanwhile], self.timeout_s, "weight update")


def from_all_ranks(mine: Any, group: Any) -> list[Any]:
    """Every rank's object, in rank order. Returns when all ranks of the group have called it."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    return gathered
