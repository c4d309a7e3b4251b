"""A Ray cluster of two nodes on one Linux machine, to try several nodes without a cluster.

    sudo .venv/bin/python scripts/clusters/two_nodes.py up --slots 1
    sudo .venv/bin/python scripts/clusters/two_nodes.py exec 1 COMMAND
    sudo .venv/bin/python scripts/clusters/two_nodes.py down

Each node is a set of Linux namespaces: it has its own network interfaces, addresses, processes,
host name, /etc/hosts, /dev/shm and /tmp/ray. All other files are shared, as on a cluster with a
shared disk. `exec` runs a command on a node, with RAY_ADDRESS set; docs/clusters.md has a training
run. For example, these commands give node 2 a view of its own:

    two_nodes.py exec 2 mount -t tmpfs none /data       node 2 does not see the files in /data
    two_nodes.py firewall 2 on                          nobody reaches its ports above 32767 (eth0)

`down` ends the processes that `up` started and everything that runs on the nodes. The kernel then
removes the namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

START_TIMEOUT_S = 120.0
OBJECT_STORE_BYTES = 150_000_000
# Ray's ports. All of them are below 32768, so that the firewall leaves them open.
RAY_PORT, DASHBOARD_PORT, FIRST_OWN_PORT = 6379, 8265, 6380
OWN_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "metrics-export-port",
)
RAY_ENV = {
    "RAY_AUTH_MODE": "disabled",  # nobody else reaches these networks
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TMPDIR": "/tmp",  # not TMPDIR, which all nodes share
}
# Packet filters of tc, as classic BPF: drop (2) a TCP packet that opens a connection (SYN without
# ACK) to a port of 32768 or more; let all others pass (-1).
FIREWALL = {
    "ip": "12,40 0 0 12,21 0 9 2048,48 0 0 23,21 0 7 6,177 0 0 14,80 0 0 27,84 0 0 18,21 0 3 2,"
    "72 0 0 16,53 0 1 32768,6 0 0 2,6 0 0 4294967295",
    "ipv6": "11,40 0 0 12,21 0 8 34525,48 0 0 20,21 0 6 6,48 0 0 67,84 0 0 18,21 0 3 2,40 0 0 56,"
    "53 0 1 32768,6 0 0 2,6 0 0 4294967295",
}


@dataclass(frozen=True, slots=True)
class Node:
    """One node, or the switch that joins the nodes."""

    name: str  # its host name
    address: str  # on eth0; "" for the switch
    init: int  # the first process in its namespaces: everything on the node ends with it
    started: str  # the start time of that process in /proc: another process may get its id later

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` on this node, in the current folder."""
        enter = ["nsenter", "--all", f"--target={self.init}", "env", f"--chdir={Path.cwd()}"]
        return [*enter, *words]

    def run(self, *words: str) -> str:
        """Runs a short command on this node. Returns its output. Raises OSError if it fails."""
        return call(*self.command(*words))


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster. `nodes[0]` is Ray's head."""

    folder: Path
    switch: Node
    nodes: list[Node]

    @property
    def address(self) -> str:
        return at(self.nodes[0].address, RAY_PORT)

    @property
    def dashboard(self) -> str:
        return f"http://{at(self.nodes[0].address, DASHBOARD_PORT)}"

    @property
    def env(self) -> dict[str, str]:
        """The variables of a driver."""
        return {**RAY_ENV, "RAY_ADDRESS": self.address}


def folder_of(name: str) -> Path:
    """Where the cluster of this name has its record and its logs."""
    return Path(tempfile.gettempdir()) / f"vime-{name}"


def why_not() -> str | None:
    """Why this machine cannot make the nodes. None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    lacks = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if lacks:
        return f"needs the commands {', '.join(lacks)}; iproute2 and util-linux have them"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return (
        f"this machine allows no namespaces: {tried.stderr.strip()}" if tried.returncode else None
    )


@contextmanager
def cluster(folder: Path, **options) -> Iterator[Cluster]:
    """A cluster that ends with the `with` block. Options as for `up`."""
    made = up(folder, **options)
    try:
        yield made
    finally:
        down(folder)


def up(
    folder: Path,
    *,
    slots: Sequence[int] = (1, 1),
    ipv4: bool = True,
    num_interfaces: int = 1,
    env: Mapping[str, str] | None = None,
) -> Cluster:
    """Starts a cluster with one node for each entry of `slots`, which is its number of CPU slots.

    folder  gets cluster.json, for `down`, and the logs of Ray
    ipv4    False: the nodes have IPv6 addresses only
    env     more variables for Ray, and so for its workers

    Raises OSError if the cluster does not start. Nothing is left of it then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "cluster.json").exists():
        raise OSError(f"{folder} has a cluster already. End it with `down`.")
    members: list[Node] = []
    try:
        for name in ("switch", *(f"node-{i}" for i in range(1, len(slots) + 1))):
            address = _address(len(members), 0, ipv4) if members else ""
            members.append(_hold(name, address))
            _write(folder, members)
        _join(members, ipv4, num_interfaces)
        for node in members[1:]:
            _give_own_files(folder, node, members[1:])
        _start_ray(folder, members[1:], slots, {**os.environ, **RAY_ENV, **(env or {})})
    except BaseException:
        down(folder, keep_logs=True)
        raise
    return Cluster(folder, members[0], members[1:])


def down(folder: Path, *, keep_logs: bool = False) -> None:
    """Ends what `up` started. Safe to call twice."""
    record = folder / "cluster.json"
    if not record.exists():
        return
    for entry in json.loads(record.read_text()):
        node = Node(**entry)
        if start_time(node.init) == node.started:
            os.kill(node.init, signal.SIGKILL)
            while start_time(node.init) == node.started:
                time.sleep(0.05)
    record.unlink()
    if not keep_logs:
        shutil.rmtree(folder)


def load(folder: Path) -> Cluster:
    """The cluster that `up` made. Raises OSError if there is none."""
    record = folder / "cluster.json"
    if not record.exists():
        raise OSError(f"there is no cluster in {folder}; start one with `up`")
    switch, *nodes = (Node(**entry) for entry in json.loads(record.read_text()))
    return Cluster(folder, switch, nodes)


def firewall(node: Node, on: bool) -> None:
    """Closes the ports from 32768 on of a node to new connections, or opens them again."""
    node.run("tc", "qdisc", "add" if on else "del", "dev", "eth0", "clsact")
    for protocol, code in FIREWALL.items() if on else ():
        rule = f"tc filter add dev eth0 ingress protocol {protocol} bpf da bytecode"
        node.run(*rule.split(), code)


def at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def call(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(f"{shlex.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _write(folder: Path, members: list[Node]) -> None:
    new = folder / "cluster.json.new"
    new.write_text(json.dumps([asdict(m) for m in members]))
    new.rename(folder / "cluster.json")


def _hold(name: str, address: str) -> Node:
    """New namespaces, held by a shell that does nothing but collect ended processes."""
    idle = f"echo {name} >/proc/sys/kernel/hostname; while :; do sleep 86400 & wait $!; done"
    apart = "--net --mount --pid --ipc --uts --fork --kill-child --mount-proc"
    outer = subprocess.Popen(
        ["unshare", *apart.split(), "bash", "-c", idle],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    below = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    deadline = time.monotonic() + 10
    try:
        while not (found := below.read_text().split()) or not _is_ready(int(found[0])):
            if outer.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"unshare does not start {name}")
            time.sleep(0.02)
    except BaseException:  # Ctrl-C, too: no record names this process yet
        outer.kill()
        raise
    return Node(name, address, int(found[0]), start_time(int(found[0])))


def _is_ready(pid: int) -> bool:
    """Whether the shell of `_hold` sleeps: then /proc is mounted and the host name set."""
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()) and b"sleep" in (
        Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def start_time(pid: int) -> str:
    """When a process started, in ticks. "" if it does not run; a zombie does not."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if after_name[0] == "Z" else after_name[19]


def _address(number: int, network: int, ipv4: bool) -> str:
    return f"10.199.{network}.{number}" if ipv4 else f"fd10:199:{network}::{number}"


def _join(members: list[Node], ipv4: bool, num_interfaces: int) -> None:
    """Gives every node interfaces eth0, eth1, ...; those of one number reach each other.

    The switch is each node's way to all other networks, and tells it that there are none.
    """
    switch, *nodes = members
    versions = [True, False] if ipv4 else [False]
    for net in range(num_interfaces):
        switch.run(*f"ip link add net{net} type bridge".split())
        _configure(switch, f"net{net}", 254, net, versions)
        for number, node in enumerate(nodes, 1):
            port = f"net{net}-{number}"
            call(*f"ip link add {port} netns {switch.init} type veth peer name eth{net} "
                 f"netns {node.init}".split())  # fmt: skip
            switch.run(*f"ip link set {port} master net{net} up".split())
            _configure(node, f"eth{net}", number, net, versions)
    for member in members:
        member.run("ip", "link", "set", "lo", "up")
    for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"]:
        switch.run("sh", "-c", f"echo 1 >/proc/sys/net/{name}")
    for node in nodes:
        for v4 in versions:
            version = "-4" if v4 else "-6"
            node.run("ip", version, *f"route add default via {_address(254, 0, v4)}".split())


def _configure(member: Node, interface: str, number: int, net: int, versions: list[bool]) -> None:
    for v4 in versions:
        where = f"{_address(number, net, v4)}/{24 if v4 else 64} dev {interface}"
        member.run(*f"ip address add {where}".split(), *(() if v4 else ("nodad",)))
    member.run(*f"ip link set {interface} up".split())


def _give_own_files(folder: Path, node: Node, nodes: list[Node]) -> None:
    own = folder / node.name
    (own / "ray").mkdir(parents=True)
    hosts = ["127.0.0.1 localhost", "::1 localhost", *(f"{n.address} {n.name}" for n in nodes)]
    (own / "hosts").write_text("\n".join(hosts) + "\n")
    Path("/tmp/ray").mkdir(exist_ok=True)
    node.run("mount", "-t", "tmpfs", "-o", "mode=1777", "none", "/dev/shm")
    node.run("mount", "--bind", str(own / "ray"), "/tmp/ray")
    node.run("mount", "--bind", str(own / "hosts"), "/etc/hosts")


def _start_ray(folder: Path, nodes: list[Node], slots: Sequence[int], env: dict[str, str]) -> None:
    head, *others = nodes
    first = ["--head", f"--port={RAY_PORT}", f"--dashboard-port={DASHBOARD_PORT}"]
    first += [f"--dashboard-host={head.address}"]
    started = [_start_node(folder, head, slots[0], first, env)]
    _wait_for_ray(started)
    for node, num_slots in zip(others, slots[1:], strict=True):
        where = [f"--address={at(head.address, RAY_PORT)}"]
        started.append(_start_node(folder, node, num_slots, where, env))
    _wait_for_ray(started)


def _start_node(
    folder: Path, node: Node, num_slots: int, flags: list[str], env: dict[str, str]
) -> tuple[subprocess.Popen, Path]:
    ports = [f"--{name}={FIRST_OWN_PORT + i}" for i, name in enumerate(OWN_PORTS)]
    flags = [
        *flags,
        f"--node-ip-address={node.address}",
        f"--num-cpus={num_slots}",
        "--num-gpus=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
        *ports,
        "--min-worker-port=11000",
        "--max-worker-port=12999",
        "--block",
    ]
    log = folder / node.name / "ray.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            node.command(sys.executable, "-m", "ray.scripts.scripts", "start", *flags),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )
    return process, log


def _wait_for_ray(started: list[tuple[subprocess.Popen, Path]]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    for process, log in started:
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"Ray does not start; {log} ends with:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="two-nodes", help="of the cluster, if you have several")
    commands = parser.add_subparsers(dest="action", required=True)
    start = commands.add_parser("up", help="start the cluster")
    start.add_argument("--slots", type=int, default=1, help="CPU slots of each node (default: 1)")
    start.add_argument("--driver-node", action="store_true", help="add a third node, without slots")
    start.add_argument("--ipv6", action="store_true", help="IPv6 addresses only")
    start.add_argument("--interfaces", type=int, default=1, help="eth0, eth1, ... of each node")
    enter = commands.add_parser("exec", help="run a command on a node")
    enter.add_argument("node", type=int)
    enter.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    wall = commands.add_parser("firewall", help="close the ports above 32767 of a node")
    wall.add_argument("node", type=int)
    wall.add_argument("state", choices=["on", "off"])
    commands.add_parser("down", help="end the cluster")
    given = parser.parse_args()
    folder = folder_of(given.name)
    if reason := why_not():
        print(f"skipped: {reason}", file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _do(given, folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _do(given: argparse.Namespace, folder: Path) -> int:
    if given.action == "up":
        slots = [given.slots] * 2 + [0] * given.driver_node
        made = up(folder, slots=slots, ipv4=not given.ipv6, num_interfaces=given.interfaces)
        print(f"RAY_ADDRESS={made.address}\ndashboard: {made.dashboard}\nlogs: {folder}")
        for number, node in enumerate(made.nodes, 1):
            print(f"{node.name} ({node.address}, {slots[number - 1]} slots): "
                  f"{sys.argv[0]} --name {given.name} exec {number} COMMAND")  # fmt: skip
    elif given.action == "down":
        down(folder)
    else:
        made = load(folder)
        if not 1 <= given.node <= len(made.nodes):
            raise OSError(f"node {given.node}: the cluster has nodes 1 to {len(made.nodes)}")
        node = made.nodes[given.node - 1]
        if given.action == "firewall":
            firewall(node, given.state == "on")
        else:
            sys.stdout.flush()
            os.environ.update(made.env)
            words = given.words or ["bash"]
            os.execvp("nsenter", node.command(*words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
