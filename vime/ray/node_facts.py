"""The facts about a node that a run needs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vime.addresses import LOOPBACK


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """
    id       Ray's id of the node
    address  on which processes on this node listen; loopback if the run has one node only
    cores    CPU cores that this run may use
    """

    id: str
    address: str
    cores: int

    @classmethod
    def of_only_node(cls, id: str) -> NodeFacts:
        """The facts of this machine, if all processes of the run are on it."""
        return cls(id=id, address=LOOPBACK, cores=len(os.sched_getaffinity(0)))
