"""Waits until the Ray cluster of RAY_ADDRESS has N nodes: `wait_for_nodes.py N`.

Ends with 1 and the nodes that are there, if the others do not come in time.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable

BETWEEN_LOOKS_S = 1.0
BETWEEN_REPORTS_S = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_nodes", type=int)
    parser.add_argument("--timeout-s", type=float, default=300.0)
    args = parser.parse_args()
    if problem := wait(os.environ["RAY_ADDRESS"], args.num_nodes, args.timeout_s):
        sys.exit(f"error: {problem}")


def wait(address: str, num_nodes: int, timeout_s: float) -> str | None:
    """None once the cluster has `num_nodes` nodes, else the problem in words."""
    deadline = time.monotonic() + timeout_s
    host, _, port = address.rpartition(":")
    while not accepts(host.strip("[]"), int(port)):
        if time.monotonic() > deadline:
            return (
                f"nothing listens at {address} after {timeout_s:g} s. Look for the head's own "
                "error above, and for a firewall that closes this port."
            )
        time.sleep(BETWEEN_LOOKS_S)

    import ray  # takes seconds, which the head needs too

    ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    next_report = 0.0
    while len(there := alive(ray.nodes())) < num_nodes:
        now = time.monotonic()
        if now > deadline:
            return (
                f"{len(there)} of {num_nodes} nodes are there after {timeout_s:g} s: "
                f"{' '.join(there)}. Look at the output of node.sh on the others."
            )
        if now > next_report:
            print(f"{len(there)} of {num_nodes} nodes are there: {' '.join(there)}", flush=True)
            next_report = now + BETWEEN_REPORTS_S
        time.sleep(BETWEEN_LOOKS_S)
    print(f"all {num_nodes} nodes are there: {' '.join(there)}", flush=True)
    ray.shutdown()
    return None


def accepts(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5.0):
            return True
    except OSError:
        return False


def alive(nodes: Iterable[dict]) -> list[str]:
    return sorted(node["NodeManagerAddress"] for node in nodes if node["Alive"])


if __name__ == "__main__":
    main()
