"""RAY_ADDRESS that leads to no cluster is refused in seconds, with the reason and a remedy."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from vime.errors import ConfigError
from vime.ray import slots

pytest.importorskip("ray")
pytestmark = pytest.mark.stack

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HTTP_1 = b"HTTP/1.1 400 Bad Request\r\n\r\n"


@pytest.fixture
def server(request) -> Iterator[str]:
    """The address of a program that answers every connection with `request.param`."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(64)
                connection.sendall(request.param)

    threading.Thread(target=answer, daemon=True).start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def refusal(address: str) -> str:
    from vime.ray.address_check import check_address

    with pytest.raises(ConfigError) as refused:
        check_address(address)
    (problem,) = refused.value.problems
    assert problem.startswith(f"RAY_ADDRESS {address}")
    return problem


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "http://10.0.0.1:8265", "ray://10.0.0.1:10001", "10.0.0.1:637x", "10.0.0.1:99999"],
)
def test_a_slip_in_the_address_is_told(address):
    assert "Give HOST:PORT as `ray start --head` prints it" in refusal(address)


def test_an_address_where_nobody_listens_is_told():
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    assert "nobody listens there, or a firewall is between" in refusal(f"127.0.0.1:{port}")


def test_a_name_that_nobody_knows_is_told():
    assert "nobody listens there" in refusal("no-such-host.invalid:6379")


@pytest.mark.parametrize("server", [HTTP_1, b""], indirect=True, ids=["http", "closes"])
def test_another_program_is_told_from_ray(server):
    assert "is not Ray's control store" in refusal(server)


def test_a_silent_program_is_told_from_ray(monkeypatch):
    from vime.ray import address_check

    monkeypatch.setattr(address_check, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "is not Ray's control store" in refusal(f"127.0.0.1:{silent.getsockname()[1]}")


def test_auto_without_a_ray_on_this_machine_is_told(monkeypatch):
    from vime.ray import address_check

    monkeypatch.setattr(address_check, "find_bootstrap_address", lambda folder: None)
    assert "no Ray was started on this machine" in refusal("auto")


def answering(monkeypatch, *, nodes: dict[str, int] | None = None, error=None) -> None:
    """Lets Ray's control store answer with nodes {address: state}, or with an error."""
    from vime.ray import address_check

    class Store:
        def __init__(self, address: str) -> None:
            if error:
                raise error

        def get_all_node_info(self, timeout: float) -> dict:
            found = (nodes or {}).items()
            return {a: SimpleNamespace(node_manager_address=a, state=s) for a, s in found}

    monkeypatch.setattr(address_check, "GcsClient", Store)
    monkeypatch.setattr(address_check, "ensure_token_if_auth_enabled", lambda **given: None)


@pytest.mark.parametrize("server", [SETTINGS], indirect=True)
def test_a_missing_token_is_told(server, monkeypatch):
    import ray

    answering(monkeypatch, error=ray.exceptions.AuthenticationError("InvalidAuthToken. Ensure"))
    problem = refusal(server)
    assert "the cluster needs its token: InvalidAuthToken. Copy the head's" in problem


@pytest.mark.parametrize("server", [SETTINGS], indirect=True)
def test_another_port_of_ray_is_told(server, monkeypatch):
    import ray

    answering(monkeypatch, error=ray.exceptions.RpcError("Method not found!", rpc_code=12))
    assert "is not Ray's control store, or is too busy to answer (Method not" in refusal(server)


@pytest.mark.parametrize("server", [SETTINGS], indirect=True)
def test_a_machine_that_is_no_node_is_told_the_nodes(server, monkeypatch):
    alive, dead = 0, 1
    answering(monkeypatch, nodes={"203.0.113.7": alive, "203.0.113.6": alive, "127.0.0.1": dead})
    problem = refusal(server)
    assert "is not a node of the cluster, whose nodes are 203.0.113.6, 203.0.113.7." in problem


@pytest.mark.parametrize("server", [SETTINGS], indirect=True)
def test_a_cluster_that_has_this_machine_is_joined(server, monkeypatch):
    from vime.ray.address_check import check_address

    answering(monkeypatch, nodes={"127.0.0.1": 0})
    assert check_address(server) == server


def test_ray_still_has_the_parts_that_the_check_uses():
    import inspect

    from vime.ray import address_check

    assert callable(address_check.GcsClient)
    assert address_check._ALIVE == 0
    asked = inspect.signature(address_check.ensure_token_if_auth_enabled).parameters
    assert "create_token_if_missing" in asked
    assert list(inspect.signature(address_check.find_bootstrap_address).parameters) == ["temp_dir"]


@pytest.mark.parametrize(
    ("value", "joins"), [("", False), ("local", False), ("auto", True), ("10.0.0.1:6379", True)]
)
def test_an_empty_address_counts_as_none(value, joins, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert slots.joins_cluster() is joins


def test_a_submitted_job_with_a_folder_takes_no_other(tmp_path, monkeypatch):
    """Ray refuses two folders, or the second would be on the driver's node only."""
    from vime.ray.cluster import code_to_copy

    name = "RAY_JOB_CONFIG_JSON_ENV_VAR"
    monkeypatch.setenv(name, json.dumps({"runtime_env": {"env_vars": {"working_dir": "x"}}}))
    assert code_to_copy(str(tmp_path)) == {"working_dir": str(tmp_path)}
    assert code_to_copy(None) is None
    monkeypatch.setenv(name, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg.zip"}}))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert code_to_copy(None) is None
    assert code_to_copy(".") is None
    with pytest.raises(ConfigError, match="(?s)--working-dir other: .*leave one of the two"):
        code_to_copy("other")
