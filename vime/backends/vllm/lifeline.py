"""How an engine over several nodes ends as soon as one of its parts has ended.

vLLM notices a lost worker only when a collective of the other workers fails. A call that each
worker answers alone, such as an update of weights, waits for the lost worker without end. So the
owner of every other part holds a connection to the owner of part 0 while its own process runs.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

_PATIENCE_S = 30.0


class Lifeline:
    """Part 0's end of the connections. It listens at `port` of `host`.

    token  what another part sends first; a stranger's connection does not count
    """

    def __init__(self, host: str) -> None:
        family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._server = socket.create_server(where, family=family)
        self._closed = False
        self.port: int = self._server.getsockname()[1]
        self.token = secrets.token_hex(16)

    def watch(self, lost: Callable[[], object]) -> None:
        """Calls `lost`, in a thread, when a connection ends before `close`."""

        def accept() -> None:
            with suppress(OSError):  # closed
                while True:
                    connection, _ = self._server.accept()
                    _thread(lambda c=connection: self._follow(c, lost))

        _thread(accept)

    def _follow(self, connection: socket.socket, lost: Callable[[], object]) -> None:
        with connection, suppress(OSError):
            connection.settimeout(_PATIENCE_S)
            said = connection.recv(len(self.token), socket.MSG_WAITALL)
            if not hmac.compare_digest(said, self.token.encode()):
                return
            connection.settimeout(None)
            _keep_alive(connection)
            with suppress(OSError):  # the kernel gave the other node up
                connection.recv(1)
            if not self._closed:
                lost()

    def close(self) -> None:
        """Connections may end from now on. Safe to call twice."""
        self._closed = True
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # ends `accept` in the other thread
        self._server.close()


def hold(host: str, port: int, token: str, until: Callable[[], object]) -> None:
    """Another part's end: the connection closes when `until` returns, or when this process ends.

    Raises OSError if part 0 cannot be reached.
    """
    connection = socket.create_connection((host, port), _PATIENCE_S)
    connection.sendall(token.encode())

    def wait() -> None:
        with connection:
            until()

    _thread(wait)


def _keep_alive(connection: socket.socket) -> None:
    """A node without power closes no connection: the kernel asks it after 10 s, then every 5 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 10),
        (socket.TCP_KEEPINTVL, 5),
        (socket.TCP_KEEPCNT, 3),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _thread(run: Callable[[], object]) -> None:
    threading.Thread(target=run, daemon=True, name="lifeline").start()
