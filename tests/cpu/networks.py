"""Two network namespaces joined by a pair of interfaces: two hosts of one name on this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

DECOY = "10.199.250.1"  # each host has an interface of this address, which reaches nobody


@dataclass(frozen=True)
class Host:
    """One end of the pair."""

    namespace: str
    ipv4: str
    ipv6: str

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` in this network."""
        return ["ip", "netns", "exec", self.namespace, *words]


@contextmanager
def two_hosts(
    name: str, versions: Collection[str] = ("ipv4", "ipv6")
) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other, and nobody else. Raises OSError if that needs more rights.

    name      short and unique on this machine
    versions  the hosts have addresses of these versions
    """
    net = os.getpid() % 200
    first, second = hosts = [
        Host(f"vime-{name}-{i}", f"10.199.{net}.{i}", f"fd10:199::{i}") for i in (1, 2)
    ]
    with ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "delete", host.namespace)
        pair = f"link add up0 type veth peer name up0 netns {second.namespace}"
        _ip("-n", first.namespace, *pair.split())
        for host in hosts:
            _add_addresses(host, versions)
        yield first, second


def _add_addresses(host: Host, versions: Collection[str]) -> None:
    commands = ["link add decoy type veth peer name nobody", f"address add {DECOY}/24 dev decoy"]
    if "ipv4" in versions:
        commands.append(f"address add {host.ipv4}/24 dev up0")
    if "ipv6" in versions:
        commands.append(f"address add {host.ipv6}/64 dev up0 nodad")
    commands += [f"link set {interface} up" for interface in ("decoy", "up0", "lo")]
    for command in commands:
        _ip("-n", host.namespace, *command.split())


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
