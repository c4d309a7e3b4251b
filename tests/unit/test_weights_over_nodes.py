"""Shared memory on two nodes: four real gloo ranks, two on each, and engines that record.

A node is a folder in place of /dev/shm.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vime.errors import EngineError
from vime.weight_sync import shared_memory, transports, wire
from vime.weight_sync.engines import BROKEN
from vime.weight_sync.sender import WeightSender
from vime.weight_sync.shared_memory import SharedMemory

WEIGHTS = [(f"w{i}", torch.arange(64.0).view(8, 8) + i) for i in range(5)]  # two fill a bucket
TWO_NODES = ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2")  # the host of each rank
TIMEOUT_S = 30.0


@dataclass
class Engine:
    """An engine with a worker on each node in `hosts`. Fails at its bucket number `fail_at`."""

    url: str
    hosts: tuple[str, ...]
    fail_at: int | None = None
    fail_pause: bool = False
    paths: list[dict[str, str]] = field(default_factory=list)
    held: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    version: int = 0

    def init_weight_transfer(self, info):
        assert info == {}

    def pause(self, mode):
        if self.fail_pause:
            raise EngineError("no pause today")

    def start_weight_update(self):
        pass

    def update_weights(self, info):
        self.paths.append(info["paths"])
        if len(self.paths) - 1 == self.fail_at:
            raise EngineError("no update today")
        size = wire.size_of(info["entries"])
        for host in self.hosts:
            path = info["paths"][host]
            packed = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
            of_host = self.held.setdefault(host, {})
            of_host |= {n: t.clone() for n, t in wire.unpack(packed, info["entries"])}

    def finish_weight_update(self):
        pass

    def reset_prefix_cache(self):
        pass

    def set_weight_version(self, version):
        self.version = version
        return [version]

    def resume(self):
        pass


@dataclass
class Outcome:
    """The result of one update on one rank."""

    problem: str
    version: int
    paths: list[dict[str, str]]
    held: bool  # whether each worker has all weights
    left: list[str]  # files in this rank's node, once all ranks have returned
    exchanges: int


def engines_of(case: str) -> list[Engine]:
    own = [Engine("http://a", ("10.0.0.1",)), Engine("http://b", ("10.0.0.2",))]
    match case:
        case "a late bucket is refused":
            own[1].fail_at = 1
        case "the last bucket is refused":
            own[0].fail_at = 2
        case "no pause":
            own[0].fail_pause = True
        case "an engine on both nodes":
            own = [Engine("http://ab", ("10.0.0.1", "10.0.0.2"))]
        case "one node of another address":
            own = [Engine("http://a", ("10.0.0.1",))]
        case "one machine":
            own = [Engine("http://127.0.0.1:9", ("127.0.0.1",))]
    return own


def update(rank: int, folder: Path, case: str, hosts: tuple[str, ...], version: int) -> Outcome:
    """One update on this rank, with a sender of its own."""
    node = folder / hosts[rank]
    node.mkdir(exist_ok=True)
    shared_memory.SHARED_MEMORY = node
    engines = engines_of(case)
    transport = SharedMemory(engines, TIMEOUT_S, rank=rank, host=hosts[rank])
    sender = WeightSender(engines, transport, rank=rank, bucket_bytes=512, timeout_s=TIMEOUT_S)
    sender.connect()
    exchanges = []
    gather = dist.all_gather_object
    allocate = os.posix_fallocate

    def counted(*args, **kw):
        exchanges.append(1)
        gather(*args, **kw)

    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    if case == "no room on the second node" and hosts[rank] == "10.0.0.2":
        os.posix_fallocate = full
    transports.dist.all_gather_object = counted
    problem = ""
    try:
        sender.send(iter(WEIGHTS), version)
    except EngineError as error:
        problem = str(error)
    finally:
        transports.dist.all_gather_object = gather
        os.posix_fallocate = allocate
    dist.barrier()
    held = all(
        torch.equal(engine.held.get(host, {}).get(name, torch.empty(0)), tensor)
        for engine in engines
        for host in engine.hosts
        for name, tensor in WEIGHTS
    )
    left = [path.name for path in node.iterdir()]
    dist.barrier()
    return Outcome(problem, engines[0].version, engines[0].paths, held, left, len(exchanges))


CASES = (
    ("every engine is well", TWO_NODES),
    ("an engine on both nodes", TWO_NODES),
    ("a late bucket is refused", TWO_NODES),
    ("the last bucket is refused", TWO_NODES),
    ("no pause", TWO_NODES),
    ("no room on the second node", TWO_NODES),
    ("every engine is well again", TWO_NODES),
    ("one node of another address", ("10.0.0.1",) * 4),
    ("one machine", ("127.0.0.1",) * 4),
)


def run_rank(rank: int, folder: str, results) -> None:
    try:
        store = dist.FileStore(f"{folder}/store", 4)
        timeout = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timeout)
        found = [
            update(rank, Path(folder), case, hosts, 7 + i) for i, (case, hosts) in enumerate(CASES)
        ]
        results.put((rank, found))
    except BaseException:
        results.put((rank, traceback.format_exc()))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list[Outcome]]:
    """{case: the outcome of each rank}."""
    spawn, folder = multiprocessing.get_context("spawn"), tmp_path_factory.mktemp("nodes")
    results = spawn.Queue()
    ranks = [spawn.Process(target=run_rank, args=(r, str(folder), results)) for r in range(4)]
    for rank in ranks:
        rank.start()
    try:
        by_rank = dict(results.get(timeout=120) for _ in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    failures = [found for found in by_rank.values() if isinstance(found, str)]
    assert not failures, failures[0]
    return {case: [by_rank[r][i] for r in range(4)] for i, (case, _) in enumerate(CASES)}


def test_each_node_has_its_own_file_of_every_bucket(outcomes):
    paths = outcomes["every engine is well"][0].paths
    assert len(paths) == 3
    for bucket in paths:
        assert set(bucket) == set(TWO_NODES)
        for host, path in bucket.items():
            assert Path(path).parent.name == host
    assert len({path for bucket in paths for path in bucket.values()}) == 6


@pytest.mark.parametrize("case", ["every engine is well", "an engine on both nodes"])
def test_workers_on_both_nodes_get_all_weights(outcomes, case):
    assert outcomes[case][0].held
    assert outcomes[case][0].problem == ""
    assert outcomes[case][0].version >= 7


@pytest.mark.parametrize("case", [case for case, _ in CASES])
def test_no_file_stays_on_any_node(outcomes, case):
    assert [outcome.left for outcome in outcomes[case]] == [[], [], [], []]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("a late bucket is refused", "no update today"),
        ("the last bucket is refused", "no update today"),
        ("no pause", "no pause today"),
        ("no room on the second node", "node 10.0.0.2: neither .* has room for 512 bytes"),
    ],
)
def test_after_a_failure_no_rank_waits_and_rank_0_says_why(outcomes, case, why):
    first, *others = outcomes[case]
    with pytest.raises(EngineError, match=why):
        raise EngineError(first.problem)
    assert first.version == BROKEN
    assert [other.problem for other in others] == [""] * 3
    assert {outcome.exchanges for outcome in outcomes[case]} == {first.exchanges}


def test_an_update_after_failures_reaches_every_engine(outcomes):
    assert outcomes["every engine is well again"][0].held


@pytest.mark.parametrize("case", ["one machine", "one node of another address"])
def test_on_one_node_the_ranks_exchange_nothing(outcomes, case):
    assert [outcome.exchanges for outcome in outcomes[case]] == [0, 0, 0, 0]
    assert outcomes[case][0].held
