"""Whether a Ray cluster answers at RAY_ADDRESS, found in seconds.

Ray itself tries for minutes to join an address that does not answer, prints a line for each
attempt, and then ends the process.
"""

from __future__ import annotations

import os
import socket

import ray
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._private.services import find_bootstrap_address
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from vime.addresses import bracketed, host_and_port, interface_of, is_loopback
from vime.errors import ConfigError

_TIMEOUT_S = 10.0
# HTTP/2, which Ray speaks: a client's first bytes (RFC 9113, section 3.4) with empty settings, and
# the place of the type in a server's first frame, which must be of type SETTINGS.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_TYPE_AT, _SETTINGS = 3, 4
_ALIVE = GcsNodeInfo.GcsNodeState.ALIVE
_GIVE = "Give HOST:PORT as `ray start --head` prints it; the port is usually 6379."


def check_address(address: str) -> str:
    """The address with the host's name resolved, because Ray's own resolver reads no /etc/hosts.

    Raises ConfigError, with the remedy, if no cluster answers there, if it needs another token, or
    if this machine is not one of its nodes.
    """
    name = f"RAY_ADDRESS {address}"
    if address == "auto":
        address = find_bootstrap_address(None) or ""
        if not address:
            raise ConfigError(
                f"{name}: no Ray was started on this machine. Start one with `ray start` "
                "(docs/clusters.md), or unset RAY_ADDRESS."
            )
        name += f", which is {address}"
    try:
        host, port = host_and_port(f"tcp://{address}")
    except ValueError:
        raise ConfigError(
            f"{name} is not an address of a Ray cluster. {_GIVE} For an http address, use `ray job "
            "submit`."
        ) from None
    try:
        peer, greeting = _greeting(host, port)
    except OSError as error:
        raise ConfigError(
            f"{name}: nobody listens there, or a firewall is between ({error}). Start the cluster "
            "with `ray start --head` (docs/clusters.md), or unset RAY_ADDRESS to use this machine "
            "alone."
        ) from None
    encrypted = os.environ.get("RAY_USE_TLS", "0") not in ("", "0")
    if not encrypted and greeting[_TYPE_AT : _TYPE_AT + 1] != bytes([_SETTINGS]):
        raise ConfigError(
            f"{name}: the program that listens there is not Ray's control store. {_GIVE} The "
            "address of the dashboard (port 8265) is for `ray job submit`."
        )
    # A certificate may be for the name. Ray replaces loopback by this node's address itself.
    keep = encrypted or is_loopback(peer)
    resolved = address if keep else f"{bracketed(peer)}:{port}"
    nodes = _shake_hands(name, resolved)
    if not any(map(_is_here, nodes)):
        raise ConfigError(
            f"{name}: this machine is not a node of the cluster, whose nodes are "
            f"{', '.join(sorted(nodes)) or 'not there yet'}. Start the driver on one of them, or "
            "send it there by `ray job submit` (docs/clusters.md)."
        )
    return resolved


def _greeting(host: str, port: int) -> tuple[str, bytes]:
    """The server's address, and its first bytes; b"" if it is silent. Raises OSError."""
    with socket.create_connection((host, port), _TIMEOUT_S) as connection:
        peer = connection.getpeername()[0]
        try:
            connection.sendall(_HELLO)
            return peer, connection.recv(64)
        except OSError:  # the server is silent or has closed the connection
            return peer, b""


def _is_here(host: str) -> bool:
    """Whether an address or a name is this machine's."""
    try:
        return interface_of(str(socket.getaddrinfo(host, 0)[0][4][0])) is not None
    except OSError:
        return False


def _shake_hands(name: str, address: str) -> list[str]:
    """The addresses of the cluster's nodes.

    It makes one attempt; `ray.init` would make twenty and forget the reason.
    """
    remedy = (
        "Copy the head's ~/.ray/auth_token to this machine, or set RAY_AUTH_TOKEN, together with "
        "RAY_AUTH_MODE=token (docs/clusters.md)."
    )
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        nodes = GcsClient(address=address).get_all_node_info(timeout=_TIMEOUT_S)
    except ray.exceptions.AuthenticationError as error:
        reason = str(error).partition(". ")[0]
        raise ConfigError(f"{name}: the cluster needs its token: {reason}. {remedy}") from None
    except ray.exceptions.RayError as error:
        raise ConfigError(
            f"{name}: the program that listens there is not Ray's control store, or is too busy to "
            f"answer ({error}). {_GIVE}"
        ) from None
    return [node.node_manager_address for node in nodes.values() if node.state == _ALIVE]
