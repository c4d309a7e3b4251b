"""Addresses and ports of engines and router, and the proxies that they pass by. Needs no vLLM."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cpu.tiny import make_config
from tests.unit.test_vllm_server import SHAPE
from vime import platform
from vime.addresses import LOOPBACK, HeldPort, url_of
from vime.backends.vllm import server
from vime.backends.vllm.dialect import dialect_of
from vime.backends.vllm.engine import VLLMEngine
from vime.backends.vllm.local_http import without_proxies
from vime.backends.vllm.router import Router, address_in_args
from vime.errors import EngineError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


@pytest.mark.parametrize("client", ["requests", "httpx"])
def test_clients_in_a_child_reach_ipv6_hosts_without_a_proxy(monkeypatch, client):
    """Users' functions and vLLM have these clients."""
    library = pytest.importorskip(client)
    given = {"http_proxy": "http://127.0.0.1:9"}
    for name, value in without_proxies(given, "[fd00::1]").items():
        monkeypatch.setenv(name, value)
    inside, outside = "http://[fd00::1]:80/health", "http://[fd00::2]:80/health"
    if client == "requests":
        assert library.utils.should_bypass_proxies(inside, None)
        assert not library.utils.should_bypass_proxies(outside, None)
    else:
        session = library.Client()
        direct = session._transport
        assert session._transport_for_url(library.URL(inside)) is direct
        assert session._transport_for_url(library.URL(outside)) is not direct


def test_a_server_talks_over_the_interface_of_its_own_address(folder, monkeypatch):
    interfaces = {"fd00::7": "eth1", LOOPBACK: "lo"}
    monkeypatch.setattr("vime.rendezvous.interface_of", interfaces.get)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.delenv(name, raising=False)

    def variables(host: str) -> dict[str, str]:
        cfg, dialect = make_config(folder), dialect_of("0.32.0")
        env = server.environment(cfg, [0], host=host, dialect=dialect, on=platform.CPU)
        assert host in env["no_proxy"].split(",")
        return {n: v for n, v in env.items() if n.endswith("_IFNAME") or n == "VLLM_HOST_IP"}

    assert variables("fd00::7") == {
        "GLOO_SOCKET_IFNAME": "eth1",
        "NCCL_SOCKET_IFNAME": "=eth1",
        "VLLM_HOST_IP": "fd00::7",
    }
    assert variables(LOOPBACK) == {"GLOO_SOCKET_IFNAME": "lo"}


def test_users_functions_get_the_routers_address_so_that_it_makes_a_url():
    for url in ("http://10.0.0.7:8123", "http://[fd00::7]:8123"):
        args = SimpleNamespace(**address_in_args(url))
        assert f"http://{args.vllm_router_ip}:{args.vllm_router_port}" == url
        assert url_of(args.vllm_router_ip, args.vllm_router_port) == url


@pytest.mark.parametrize(
    ("asked", "listens", "reached"),
    [
        (None, "10.0.0.7", "10.0.0.7"),
        ("10.1.0.7", "10.1.0.7", "10.1.0.7"),
        ("0.0.0.0", "0.0.0.0", "10.0.0.7"),
        ("::", "::", "10.0.0.7"),
        ("[fd00::7]", "fd00::7", "fd00::7"),
    ],
)
def test_the_router_listens_on_its_nodes_address_unless_told_otherwise(
    tmp_path, asked, listens, reached
):
    cfg = make_config(tmp_path, engine={"router_ip": asked}, log={"run_dir": str(tmp_path)})
    router = Router(cfg, host="10.0.0.7")
    assert (router.host, router.reached_at) == (listens, reached)


def test_a_router_address_of_another_machine_is_refused(tmp_path):
    cfg = make_config(tmp_path, engine={"router_ip": "192.0.2.1"}, log={"run_dir": str(tmp_path)})
    router = Router(cfg)
    with pytest.raises(EngineError, match="(?s)192.0.2.1 of .*--vllm-router-ip takes an address"):
        router.start(["http://127.0.0.1:1"])
    assert router.process is None


def test_an_engine_keeps_its_port_while_its_server_starts_again(folder):
    engine = VLLMEngine(make_config(folder), 0, [0])
    port = engine._hold_port(None)
    assert engine._hold_port(f"http://127.0.0.1:{port}") == port
    assert HeldPort(LOOPBACK).port != port


def test_an_engine_names_a_port_that_another_program_took(folder, monkeypatch):
    monkeypatch.setattr("vime.backends.vllm.engine.STOP_PATIENCE_S", 0.0)
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        engine = VLLMEngine(make_config(folder), 3, [0])
        with pytest.raises(EngineError, match=f"vLLM engine 3 cannot listen on .*:{port}"):
            engine._hold_port(f"http://127.0.0.1:{port}")


def test_the_parts_of_an_engine_meet_at_its_url_and_at_a_new_port_each_time(folder):
    engine = VLLMEngine(make_config(folder), 0, [0], num_parts=2)
    first = engine.meet()
    again = engine.meet(first.url)
    assert again.url == first.url
    assert again.master_port != first.master_port
    assert HeldPort(LOOPBACK).port not in (first.master_port, again.master_port)


def test_the_parts_of_an_engine_have_their_own_names_and_logs(folder):
    cfg = make_config(folder)
    parts = [VLLMEngine(cfg, 3, [0], part=part, num_parts=2) for part in range(2)]
    assert [part.log.name for part in parts] == ["engine-3.log", "engine-3-part-1.log"]
    with pytest.raises(EngineError, match="vLLM engine 3, part 1 was not started"):
        parts[1].check()
