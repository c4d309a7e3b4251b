"""scripts/clusters/ssh.sh with real Ray nodes, the second in a network namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

CLUSTERS = Path(__file__).parents[2] / "scripts" / "clusters"
SSH = """#!/usr/bin/env bash
# Stands for ssh: a shell in the namespace, without this one's variables.
exec ip netns exec {name} env -i HOME=/nonexistent PATH=/usr/bin:/bin "${{@:2}}"
"""
DRIVER = """
import json, os, sys, ray
ray.init(logging_level="ERROR")
nodes = {n["NodeManagerAddress"]: n["Resources"]["CPU"] for n in ray.nodes()}
there = ray.remote(ray.util.get_node_ip_address)
found = ray.get([there.options(resources={f"node:{a}": 0.1}, num_cpus=0).remote() for a in nodes])
json.dump([nodes, sorted(found), os.environ["RAY_AUTH_MODE"]], open(sys.argv[1], "w"))
sys.exit(7)
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace at 10.231.9.2. This machine reaches it from 10.231.9.1."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    name = f"vimessh{os.getpid()}"
    here, there = f"vsa{os.getpid()}", f"vsb{os.getpid()}"
    inside = ["ip", "netns", "exec", name]
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("this machine allows no network namespaces")
    try:
        for command in (
            ["ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", name],
            ["ip", "addr", "add", "10.231.9.1/24", "dev", here],
            ["ip", "link", "set", here, "up"],
            [*inside, "ip", "addr", "add", "10.231.9.2/24", "dev", there],
            [*inside, "ip", "link", "set", there, "up"],
            [*inside, "ip", "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True, capture_output=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", here], capture_output=True)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_ssh_starts_two_nodes_runs_a_driver_and_leaves_nothing(namespace, tmp_path):
    (tmp_path / "ssh").write_text(SSH.format(name=namespace))
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "driver.py").write_text(DRIVER)
    ray_folder = Path(f"/tmp/vssh{os.getpid()}")
    first = 21000 + os.getpid() % 1000 * 10
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = kept | {
        "SSH": str(tmp_path / "ssh"),
        "HOSTS": "second",
        "NODE_ADDRESS": "10.231.9.1",
        "NUM_CPUS": "1",
        "OBJECT_STORE_BYTES": "200000000",
        "RAY_PORT": str(first),
        "DASHBOARD_PORT": str(first + 1),
        "AGENT_PORT": str(first + 2),
        "NODE_PORTS": str(first + 3),
        "WORKER_PORTS": "19000-19999",
        "RAY_TMPDIR": str(ray_folder),
        "REMOVE_RAY_TMPDIR": "1",
        "NODES_TIMEOUT_S": "90",
    }
    seen = tmp_path / "seen.json"
    command = ["bash", str(CLUSTERS / "ssh.sh"), "python3", str(tmp_path / "driver.py"), str(seen)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 7, done.stderr
    both = ["10.231.9.1", "10.231.9.2"]
    assert json.loads(seen.read_text()) == [dict.fromkeys(both, 1.0), both, "token"]
    assert done.stderr.count("Ray has ended here") == 2
    left = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    assert left.stdout == ""
    assert not ray_folder.exists()
