"""The store at which ranks meet, and the interface that gloo and NCCL use."""

from __future__ import annotations

from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from tests.unit.test_addresses import HOSTS
from vime.addresses import LOOPBACK, interface_of
from vime.rendezvous import interface_variables, listening_store


@pytest.mark.parametrize("host", HOSTS)
def test_ranks_meet_at_a_store_that_listens_on_one_address_only(host):
    store = listening_store(host, 20)
    other = dist.TCPStore(host, store.port, None, timeout=timedelta(seconds=20))
    other.set("greeting", "hello")
    assert store.get("greeting") == b"hello"
    listeners = [
        found.laddr.ip
        for found in psutil.Process().net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == store.port
    ]
    assert listeners == [host]


def test_stores_of_two_runs_have_ports_of_their_own():
    stores = [listening_store(LOOPBACK, 20) for _ in range(5)]
    assert len({store.port for store in stores}) == 5


def test_gloo_uses_the_interface_of_the_nodes_address(monkeypatch):
    interfaces = {"10.0.0.7": "ib0", "127.0.0.1": "lo"}
    monkeypatch.setattr("vime.rendezvous.interface_of", interfaces.get)
    assert interface_variables("10.0.0.7", {}) == {
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "=ib0",
    }
    assert interface_variables("127.0.0.1", {}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert interface_variables("10.0.0.8", {}) == {}


def test_a_users_own_choice_of_an_interface_stays():
    given = {"GLOO_SOCKET_IFNAME": "eth9", "NCCL_SOCKET_IFNAME": "^docker"}
    assert interface_variables(LOOPBACK, given) == {}
    assert interface_variables(LOOPBACK, {"GLOO_SOCKET_IFNAME": ""}) == {
        "GLOO_SOCKET_IFNAME": interface_of(LOOPBACK)
    }
