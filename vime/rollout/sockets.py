"""How many requests a machine can hold open: each takes files and a port."""

from __future__ import annotations

import resource
from pathlib import Path

FILES_PER_REQUEST = 2  # in the router, which has the same limit: to the client and to an engine
SPARE_FILES, SPARE_PORTS = 1024, 1024  # for everything else
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")  # IPv6 uses the same


def raise_file_limit() -> int:
    """Raises the limit of open files to its hard limit, also for processes that start later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**20 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def most_requests() -> tuple[int, str]:
    """The number of requests to one address that can be open, and the setting that limits it.

    Beyond it a connection fails with "too many open files" or "cannot assign requested address".
    """
    files = raise_file_limit()
    limits = [((files - SPARE_FILES) // FILES_PER_REQUEST, f"ulimit -n {files}")]
    if PORT_RANGE.exists():
        first, last = map(int, PORT_RANGE.read_text().split())
        ports = last - first + 1 - SPARE_PORTS
        limits.append((ports, f"sysctl net.ipv4.ip_local_port_range = {first} {last}"))
    most, setting = min(limits)
    return max(most, 1), setting
