"""Addresses, interfaces and held ports of this machine."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
import threading

import psutil
import pytest

from vime.addresses import (
    LOOPBACK,
    HeldPort,
    address_of,
    free_port,
    host_and_port,
    interface_of,
    is_loopback,
    listening,
    url_of,
)
from vime.errors import ConfigError


def has_ipv6() -> bool:
    try:
        HeldPort("::1").close()
    except OSError:
        return False
    return True


HOSTS = [
    LOOPBACK,
    pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
]


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("127.0.0.1", 80, "http://127.0.0.1:80"),
        ("node-1", 8000, "http://node-1:8000"),
        ("::1", 80, "http://[::1]:80"),
        ("fd00::a:1", 65535, "http://[fd00::a:1]:65535"),
    ],
)
def test_a_url_holds_host_and_port(host, port, url):
    assert url_of(host, port) == url
    assert host_and_port(url) == (host, port)


@pytest.mark.parametrize("url", ["http://node-1", "node-1:80", "", "http://:80"])
def test_a_url_without_host_or_port_is_refused(url):
    with pytest.raises(ValueError, match="no host or no port"):
        host_and_port(url)


def test_loopback_addresses_are_known():
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["10.0.0.1", "fd00::1", "node-1", "0.0.0.0"]))


class Entry:
    def __init__(self, address):
        self.address = address


@pytest.fixture
def interfaces(monkeypatch):
    found = {
        "lo": [Entry("127.0.0.1"), Entry("::1"), Entry("00:00:00:00:00:00")],
        "eth0": [Entry("fe80::1%eth0"), Entry("fd00::7"), Entry("10.0.0.7")],
        "ib0": [Entry("fe80::2%ib0"), Entry("fd00:0:0::8")],
        "down": [Entry("52:54:00:00:00:01")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


def test_an_address_names_its_interface(interfaces):
    asked = ["127.0.0.1", "::1", "10.0.0.7", "fd00::8", "fd00:0::8", "fe80::1%eth0", "10.0.0.8"]
    assert list(map(interface_of, asked)) == ["lo", "lo", "eth0", "ib0", "ib0", "eth0", None]
    assert interface_of("node-1") is None


def test_an_interface_names_its_address(interfaces):
    assert [address_of(name) for name in ("lo", "eth0", "ib0")] == [
        "127.0.0.1",
        "10.0.0.7",
        "fd00::8",
    ]


@pytest.mark.parametrize(
    ("name", "fault"), [("eth7", "does not exist"), ("down", "has no address")]
)
def test_an_interface_that_cannot_serve_is_refused_with_those_that_can(interfaces, name, fault):
    with pytest.raises(ConfigError) as refusal:
        address_of(name)
    message = str(refusal.value)
    assert f"--node-interface {name}: this interface {fault}" in message
    assert "lo (127.0.0.1, ::1)" in message
    assert "down (no address)" in message
    assert "leave the flag out" in message


def test_this_machine_has_a_loopback_interface():
    assert address_of(interface_of(LOOPBACK)) == LOOPBACK


# -- ports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_a_held_port_accepts_no_connection_until_its_server_listens(host):
    with HeldPort(host) as held:
        assert not listening(host, held.port)
        with socket.create_server(
            (host, held.port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ):
            assert all(listening(host, held.port) for _ in range(20))
        assert not listening(host, held.port)


@pytest.mark.parametrize("host", HOSTS)
def test_an_asyncio_server_listens_on_a_held_port(host):
    async def serve() -> bytes:
        async def answer(_, writer):
            writer.write(b"hello")
            writer.close()

        with HeldPort(host) as held:
            async with await asyncio.start_server(answer, host, held.port):
                reader, writer = await asyncio.open_connection(host, held.port)
                said = await reader.read()
                writer.close()
                return said

    assert asyncio.run(serve()) == b"hello"


BIND_WITHOUT_END = """
import socket, sys
from vime.addresses import HeldPort
for host, any_host in (("127.0.0.1", "0.0.0.0"), ("::1", "::"))[: int(sys.argv[1])]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = [HeldPort(host) for _ in range(10)]
    for options in ((), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,)):
        for bound in (host, any_host):
            others = []
            try:
                while True:
                    others.append(socket.socket(family))
                    for option in options:
                        others[-1].setsockopt(socket.SOL_SOCKET, option, 1)
                    others[-1].bind((bound, 0))
            except OSError:
                ports = {s.getsockname()[1] for s in others[:-1]}
            assert len(ports) == 10 and not ports & {h.port for h in held}, (host, options, bound)
            for s in others:
                s.close()
"""


def test_nobody_who_asks_for_any_port_gets_a_held_one():
    """Half of all 20 ports of a network namespace are held. Others get the other half, no more."""
    script = (
        "ip link set lo up && echo 40000 40019 > /proc/sys/net/ipv4/ip_local_port_range "
        '&& exec "$0" "$@"'
    )
    own_network = ["unshare", "--net", "bash", "-c", script]
    if subprocess.run([*own_network, "true"], capture_output=True).returncode:
        pytest.skip("needs root and iproute2, for a network namespace")
    families = "2" if has_ipv6() else "1"
    done = subprocess.run(
        [*own_network, sys.executable, "-c", BIND_WITHOUT_END, families],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_port_on_which_another_program_listens_cannot_be_held():
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"another program listens on .*:{port}") as refusal:
            HeldPort(LOOPBACK, port)
    assert refusal.value.errno == errno.EADDRINUSE
    with HeldPort(LOOPBACK, port) as held:
        assert held.port == port


def test_a_port_is_held_as_soon_as_its_last_server_has_left():
    other = socket.create_server((LOOPBACK, 0))
    port = other.getsockname()[1]
    threading.Timer(0.3, other.close).start()
    with HeldPort(LOOPBACK, port, patience_s=30) as held:
        assert held.port == port


def test_an_address_of_another_machine_cannot_be_held():
    with pytest.raises(OSError, match="assign requested address"):
        HeldPort("192.0.2.1")


def test_a_port_given_back_is_free():
    port = free_port()
    with socket.socket() as s:
        s.bind((LOOPBACK, port))  # without SO_REUSEADDR
