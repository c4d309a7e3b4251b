"""Collectives between two hosts of one name, each with several interfaces. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cpu.networks import two_hosts

RANK = """
import os, sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from vime.rendezvous import interface_variables, listening_store
from vime.weight_sync import wire

rank, own, master, note = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
os.environ.update(interface_variables(own, os.environ))
if rank == 0:
    store = listening_store(own, 20)
    note.with_suffix(".partial").write_text(str(store.port))
    note.with_suffix(".partial").rename(note)
else:
    import time
    while not note.exists():
        time.sleep(0.05)
    store = dist.TCPStore(master, int(note.read_text()), 2, timeout=timedelta(seconds=20))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
weights = listening_store(own, 20) if rank == 0 else None
port = torch.tensor([weights.port if weights else 0])
dist.broadcast(port, 0)
group = wire.join_group("gloo", master, int(port), rank, 2, 20, store=weights)
sent = torch.arange(5.0) if rank == 0 else torch.zeros(5)
wire.broadcast(group, sent)
dist.barrier()
print(total.item(), sent.tolist())
"""


@pytest.fixture
def hosts(request):
    versions = request.param
    try:
        with two_hosts(f"net{os.getpid()}", versions) as made:
            yield made
    except OSError as error:
        pytest.skip(f"needs root and iproute2, for network namespaces: {error}")


def joined(hosts, addresses, note) -> list[subprocess.CompletedProcess]:
    """Both ranks of RANK, each on its host."""
    env = {k: v for k, v in os.environ.items() if not k.endswith("_SOCKET_IFNAME")}
    ranks = [
        subprocess.Popen(
            host.command(
                sys.executable, "-c", RANK, str(rank), addresses[rank], addresses[0], str(note)
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank, host in enumerate(hosts)
    ]
    try:
        return [
            subprocess.CompletedProcess(r.args, r.wait(), out, err)
            for r in ranks
            for out, err in [r.communicate(timeout=90)]
        ]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("hosts", "used"), [(("ipv4", "ipv6"), "ipv4"), (("ipv6",), "ipv6")], indirect=["hosts"]
)
def test_ranks_on_two_hosts_reduce_and_broadcast(hosts, used, tmp_path):
    ranks = joined(hosts, [getattr(host, used) for host in hosts], tmp_path / "port")
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr
        assert rank.stdout.strip() == "3.0 [0.0, 1.0, 2.0, 3.0, 4.0]"
