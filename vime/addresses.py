"""Addresses, network interfaces and ports of this machine, for IPv4 and IPv6."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import time
from urllib.parse import urlsplit

import psutil

from vime.errors import ConfigError

LOOPBACK = "127.0.0.1"  # where all servers listen if the run has one node


def bracketed(host: str) -> str:
    """The host as it stands in a URL: "10.0.0.1", "node-1", "[::1]"."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def url_of(host: str, port: int) -> str:
    """("::1", 80) -> "http://[::1]:80"."""
    return f"http://{bracketed(host)}:{port}"


def host_and_port(url: str) -> tuple[str, int]:
    """ "http://[::1]:80" -> ("::1", 80). Raises ValueError if the URL has no host or no port."""
    parts = urlsplit(url)
    if not parts.hostname or not parts.port:
        raise ValueError(f"{url!r} has no host or no port")
    return parts.hostname, parts.port


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host: "127.0.0.1", "::1", "localhost"."""
    parsed = _parsed(host)
    return parsed.is_loopback if parsed else host == "localhost"


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has the address; None if no interface has it."""
    wanted = _parsed(address)
    return next((name for name, held in _interfaces().items() if wanted in held), None)


def address_of(interface: str) -> str:
    """The address of a network interface of this machine: IPv4 if it has one, else IPv6.

    Raises ConfigError if there is no such interface or if it has no address.
    """
    interfaces = _interfaces()
    # An address that is valid on one link only cannot be given to other nodes.
    usable = [held for held in interfaces.get(interface, ()) if not held.is_link_local]
    if usable:
        return str(min(usable, key=lambda held: held.version))
    lacks = "has no address" if interface in interfaces else "does not exist"
    found = ", ".join(
        f"{name} ({', '.join(map(str, held)) or 'no address'})"
        for name, held in sorted(interfaces.items())
    )
    raise ConfigError(
        f"--node-interface {interface}: this interface {lacks} on {socket.gethostname()}. Choose "
        f"one of {found}, or leave the flag out."
    )


def is_unspecified(host: str) -> bool:
    """Whether the host stands for all addresses of this machine: "0.0.0.0" or "::"."""
    parsed = _parsed(host)
    return parsed is not None and parsed.is_unspecified


def _interfaces() -> dict[str, list[ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """{name: its addresses}. An interface without addresses is in it, too."""
    return {
        name: [parsed for entry in entries if (parsed := _parsed(entry.address))]
        for name, entries in psutil.net_if_addrs().items()
    }


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address.strip("[]").partition("%")[0])
    except ValueError:  # a host's name, or the hardware address of an interface
        return None


def listening(host: str, port: int, timeout_s: float = 1.0) -> bool:
    """Whether any program accepts connections at this address."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout_s):
        return True
    return False


def free_port(host: str = LOOPBACK) -> int:
    """A port that is free now. Another process may take it before it is bound: see `HeldPort`."""
    with HeldPort(host) as held:
        return held.port


class HeldPort:
    """Keeps a port of `host` until `close`, for a server that has yet to start.

    The socket is bound but does not listen. Linux gives such a port to nobody who asks for any free
    port. It lets a server bind the port that asks for it by number and sets SO_REUSEADDR, as
    uvicorn, vLLM, vllm-router and TCPStore do. Connections reach that server only, so the port may
    be held for as long as its server may start again.

    host        an address or a name of this machine
    port        the port to hold; 0: any free port
    patience_s  how long to wait for a program that listens there to leave

    Raises OSError if another program listens there, or if the host is not of this machine.
    """

    def __init__(self, host: str = LOOPBACK, port: int = 0, *, patience_s: float = 0.0) -> None:
        self.host = host
        deadline = time.monotonic() + patience_s
        while port and listening(host, port):
            if time.monotonic() > deadline:
                raise OSError(errno.EADDRINUSE, f"another program listens on {url_of(host, port)}")
            time.sleep(0.1)
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._socket = socket.socket(family, kind)
        try:
            # With SO_REUSEPORT, a server of this user may bind without SO_REUSEADDR, too.
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                self._socket.setsockopt(socket.SOL_SOCKET, option, 1)
            self._socket.bind(where)
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back. Safe to call twice."""
        self._socket.close()

    def __enter__(self) -> HeldPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
