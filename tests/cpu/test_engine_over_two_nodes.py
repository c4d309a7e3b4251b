"""An engine with tensor parallelism over two nodes, which are networks of this machine.

Needs root and vLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.networks import two_hosts

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900  # two cores import vLLM ten times


@pytest.fixture(scope="module")
def seen(tied_checkpoint, tmp_path_factory) -> list[dict]:
    """The observations of both nodes."""
    pytest.importorskip("vllm", reason="needs vLLM")
    run_dir = tmp_path_factory.mktemp("run")
    env = {k: v for k, v in os.environ.items() if not k.endswith("_SOCKET_IFNAME")}
    try:
        with two_hosts(f"eng{os.getpid()}", ("ipv4",)) as hosts:
            nodes = [
                subprocess.Popen(
                    host.command(
                        sys.executable,
                        "-m",
                        "tests.cpu.part_of_engine",
                        *(str(rank), host.ipv4, hosts[0].ipv4, str(tied_checkpoint), str(run_dir)),
                    ),
                    cwd=ROOT,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=(run_dir / f"node-{rank}.log").open("w"),
                    text=True,
                )
                for rank, host in enumerate(hosts)
            ]
            try:
                outputs = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
            finally:
                for node in nodes:
                    node.kill()
    except OSError as error:
        pytest.skip(f"needs root and iproute2, for network namespaces: {error}")
    for rank, node in enumerate(nodes):
        assert node.returncode == 0, (run_dir / f"node-{rank}.log").read_text()[-8000:]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.parametrize(
    ("transport", "version"), [("shared memory", 1), ("broadcast", 2)], ids=["shm", "gloo"]
)
def test_workers_on_both_nodes_get_new_weights_and_confirm_their_version(seen, transport, version):
    first = seen[0][transport]
    assert first["versions"] == [version, version]
    assert first["spans"] == [[str(version), 0, 24]]
    assert first["worst"] < 1e-4


def test_each_worker_reads_the_file_of_its_own_node(seen):
    """The second node's file has other weights, and only the worker there reports them."""
    assert "worker 1 of engine" in seen[0]["wrong"]
    assert "received wrong bytes" in seen[0]["wrong"]
    assert [node["files"] for node in seen] == [[], []]


def test_the_loss_of_a_part_is_noticed_and_all_parts_start_again_at_the_same_url(seen):
    assert "vLLM engine 0, part 1 ended with code" in seen[1]["lost"]
    assert "engine-0-part-1.log" in seen[1]["lost"]
