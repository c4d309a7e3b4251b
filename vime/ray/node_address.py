"""The address of this node in a run over several nodes."""

from __future__ import annotations

import ray

from vime.addresses import address_of
from vime.config import Config


def node_address(cfg: Config) -> str:
    """The address of --node-interface on this node, else the address that Ray uses.

    Call it in a process of Ray on the node. Raises ConfigError if the node has no such interface.
    """
    if interface := cfg.cluster.node_interface:
        return address_of(interface)
    return ray.util.get_node_ip_address().strip("[]")
