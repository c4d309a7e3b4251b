"""A small /dev/shm, a long TMPDIR, several nodes: the run works, or says what to do."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from tests.unit.fake_engine import make_config
from vime.errors import ConfigError, EngineError
from vime.platform import LONGEST_SOCKET_PATH
from vime.ray.launch import keep_socket_paths_short
from vime.ray.slots import check_slots
from vime.weight_sync import shared_memory


class Engine:
    """Reads a bucket as an engine does."""

    url = "http://127.0.0.1:1"

    def __init__(self):
        self.got = []

    def init_weight_transfer(self, info):
        pass

    def update_weights(self, info):
        (path,) = info["paths"].values()
        size = os.stat(path).st_size
        self.got.append((path, torch.from_file(path, size=size, dtype=torch.uint8)))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(shared memory, temporary folder, set of full folders). Shared memory is full at first."""
    shared, temporary = tmp_path / "shm", tmp_path / "tmp"
    shared.mkdir()
    temporary.mkdir()
    full = {shared}
    allocate = os.posix_fallocate

    def allocate_where_there_is_room(fd, offset, size):
        if any(os.readlink(f"/proc/self/fd/{fd}").startswith(str(folder)) for folder in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate_where_there_is_room)
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", shared)
    monkeypatch.setattr(shared_memory.tempfile, "gettempdir", lambda: str(temporary))
    return shared, temporary, full


def test_a_bucket_goes_to_the_temporary_folder_when_shared_memory_is_full(folders):
    shared, temporary, _ = folders
    engine = Engine()
    transport = shared_memory.SharedMemory([engine], 10.0)
    weight = torch.arange(16, dtype=torch.float32)
    assert transport.send([("w", weight)]) == 64
    ((path, content),) = engine.got
    assert path.startswith(str(temporary))
    assert torch.equal(content[:64].view(torch.float32), weight)
    assert [*shared.iterdir(), *temporary.iterdir()] == []


def test_a_bucket_without_any_room_is_an_error_that_says_what_helps(folders):
    shared, temporary, full = folders
    full.add(temporary)
    transport = shared_memory.SharedMemory([Engine()], 10.0)
    with pytest.raises(EngineError, match="has room for 64 bytes.*--shm-size.*TMPDIR"):
        transport.send([("w", torch.ones(16))])
    assert [*shared.iterdir(), *temporary.iterdir()] == []


def test_ray_keeps_a_temporary_folder_that_its_sockets_fit_into(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/scratch")
    keep_socket_paths_short()
    assert "RAY_TMPDIR" not in os.environ


def test_ray_uses_tmp_when_the_temporary_folder_is_too_long(monkeypatch, capsys):
    monkeypatch.setenv("RAY_TMPDIR", "")
    monkeypatch.setenv("TMPDIR", "/scratch/" + "a" * 60)
    keep_socket_paths_short()
    assert os.environ["RAY_TMPDIR"] == "/tmp"
    assert "TMPDIR /scratch/aaa" in capsys.readouterr().err


def test_a_folder_chosen_for_ray_itself_is_refused_when_it_is_too_long(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/" + "a" * 60)
    with pytest.raises(ConfigError, match=f"RAY_TMPDIR.*{LONGEST_SOCKET_PATH} bytes"):
        keep_socket_paths_short()


def test_several_nodes_need_a_cluster(tmp_path, monkeypatch):
    cfg = make_config(tmp_path, cluster={"actor_num_nodes": 2, "actor_gpus_per_node": 1})
    for unset in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", unset)
        (problem,) = check_slots(cfg)
        assert problem.startswith("--actor-num-nodes 2 needs a Ray cluster.")
        assert "RAY_ADDRESS" in problem
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert check_slots(cfg) == []


def test_an_engine_over_several_nodes_needs_a_cluster(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    flags = {"actor_gpus_per_node": 1, "rollout_gpus_asked": 2, "gpus_per_engine": 2}
    cfg = make_config(tmp_path, cluster={**flags, "gpus_per_node": 1, "cpu_slots": 3})
    (problem,) = check_slots(cfg)
    assert problem.startswith(
        "--rollout-num-gpus-per-engine 2 is more than --num-gpus-per-node 1, so an engine needs 2 "
        "nodes of a Ray cluster."
    )
    cfg = make_config(tmp_path, cluster={**flags, "gpus_per_node": 2, "cpu_slots": 3})
    assert check_slots(cfg) == []
