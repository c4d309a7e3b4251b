"""The Ray cluster of a run: joining it, its GPUs or CPUs, its nodes and their free slots."""

from __future__ import annotations

import json
import os
import time

import ray
from ray._private.state import available_resources_per_node

from vime.config import Config
from vime.errors import ConfigError
from vime.platform import CPU, CUDA, Platform, choose, current, named
from vime.ray.address_check import check_address
from vime.ray.node_plan import Node, NodePlan, Shape, fits, idle, plan

_SETTLE_S = 5.0
_POLL_S = 0.25


def with_code(working_dir: str | None) -> dict[str, str] | None:
    """Ray's runtime environment that copies a folder to every node and puts it on the path."""
    return None if working_dir is None else {"working_dir": os.path.abspath(working_dir)}


def code_to_copy(working_dir: str | None) -> dict[str, str] | None:
    """As `with_code`; None if a submitted job has brought a folder, which is the current one then.

    Raises ConfigError if the folders differ, because Ray copies one.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if "working_dir" not in job.get("runtime_env", {}):
        return with_code(working_dir)
    if working_dir is not None and not os.path.samefile(working_dir, os.getcwd()):
        raise ConfigError(
            f"--working-dir {working_dir}: `ray job submit --working-dir` has brought another "
            "folder to the nodes, and Ray copies one folder only. Put all code into one, and leave "
            "one of the two flags out."
        )
    return None


def join(working_dir: str | None = None, device: str = "auto") -> None:
    """Connect to the cluster of RAY_ADDRESS, and choose GPUs or CPUs.

    working_dir  a folder that Ray copies to every node
    device       --device; auto: GPUs if any node has them

    Does nothing if this process is connected. Raises ConfigError.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        given = os.environ["RAY_ADDRESS"]
        address = check_address(given)
        env = code_to_copy(working_dir)
        try:
            ray.init(address=address, runtime_env=env, logging_level="ERROR")
        except (Exception, SystemExit) as error:  # versions differ, or no cluster for "auto"
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"RAY_ADDRESS {given}: Ray cannot join this cluster: {reason}. Start the driver on "
                "a node of the cluster, with the cluster's versions of Ray and Python."
            ) from None
    has_gpus = ray.cluster_resources().get(CUDA.ray_resource)
    choose(named(device) if device != "auto" else CUDA if has_gpus else CPU)


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
