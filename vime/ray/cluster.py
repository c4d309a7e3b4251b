"""The Ray cluster of a run: joining it, its GPUs or CPUs, its nodes and their free slots."""

from __future__ import annotations

import os
import time

import ray
from ray._private.state import available_resources_per_node

from vime.addresses import host_and_port, listening
from vime.config import Config
from vime.errors import ConfigError
from vime.platform import CPU, CUDA, Platform, choose, current
from vime.ray.node_plan import Node, NodePlan, Shape, fits, idle, plan

_CONNECT_TIMEOUT_S = 10.0
_SETTLE_S = 5.0
_POLL_S = 0.25


def join(working_dir: str | None = None) -> None:
    """Connect to the cluster of RAY_ADDRESS, and choose GPUs or CPUs by its nodes.

    working_dir  a folder that Ray copies to every node. The folder of a submitted job comes first

    Does nothing if this process is connected. Raises ConfigError.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = os.environ["RAY_ADDRESS"]
        _check_address(address)
        in_job = "working_dir" in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
        env = {"working_dir": working_dir} if working_dir and not in_job else None
        try:
            ray.init(address=address, runtime_env=env, logging_level="ERROR")
        except (Exception, SystemExit) as error:  # versions that differ, no token, not a Ray
            raise ConfigError(
                f"RAY_ADDRESS {address}: Ray cannot join this cluster: {error}. Use the cluster's "
                "versions of Ray and Python, and its token if it has one."
            ) from None
    choose(CUDA if ray.cluster_resources().get(CUDA.ray_resource) else CPU)


def _check_address(address: str) -> None:
    """Ray itself waits for more than a minute if nobody listens, and then ends the process."""
    if address == "auto":
        return
    name = f"RAY_ADDRESS {address}"
    try:
        host, port = host_and_port(f"tcp://{address}")
    except ValueError:
        raise ConfigError(
            f"{name} is not an address of a Ray cluster. Give HOST:PORT as `ray start --head` "
            "prints it; the port is usually 6379."
        ) from None
    if not listening(host, port, _CONNECT_TIMEOUT_S):
        raise ConfigError(
            f"{name}: nobody listens there, or a firewall is between. Start the cluster with "
            "`ray start --head` (docs/clusters.md), or unset RAY_ADDRESS to use this machine alone."
        )


def planned(cfg: Config) -> tuple[list[Node], NodePlan]:
    """The cluster's nodes, and the plan of those that the run uses. Raises ConfigError.

    A run that has just ended still holds slots for a moment. So a run that would fit without others
    gets a moment too.
    """
    on, shape, deadline = current(), Shape.of(cfg), time.monotonic() + _SETTLE_S
    while True:
        found = nodes(on)
        settled = fits(found, shape) or not fits(idle(found), shape)
        if settled or time.monotonic() > deadline:
            return found, plan(found, shape, driver=driver_node(), unit=on.slots_name)
        time.sleep(_POLL_S)


def nodes(on: Platform) -> list[Node]:
    """The nodes that are alive, in the order of their addresses."""
    free = available_resources_per_node()
    found = [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            slots=int(node["Resources"].get(on.ray_resource, 0)),
            free=int(free.get(node["NodeID"], {}).get(on.ray_resource, 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: node.order)


def driver_node() -> str:
    """The id of the node on which this process runs."""
    return ray.get_runtime_context().get_node_id()
