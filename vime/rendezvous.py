"""Where the processes of a group meet: rank 0's store, and the interface that they talk over."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from vime.addresses import interface_of, is_loopback

if TYPE_CHECKING:
    import torch.distributed as dist


def listening_store(host: str, timeout_s: float) -> dist.TCPStore:
    """A store that listens on any free port of `host`, and on no other address of this machine.

    Rank 0 makes it before the others know the port (`store.port`), so nobody can take the port.
    The constructor does not wait for them.
    """
    import torch.distributed as dist

    family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    server = socket.create_server(where, family=family, backlog=4096)
    port = server.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        None,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


def interface_variables(address: str, env: Mapping[str, str]) -> dict[str, str]:
    """The variables that make gloo and NCCL use the interface of this node's `address`.

    By themselves they use the interface of the host's name, or the first one. That may be an
    interface that other nodes cannot reach. Variables that `env` has are left as they are. NCCL
    stays free if the address is loopback: its peers are on this machine.
    """
    interface = interface_of(address)
    if interface is None:
        return {}
    wanted = {"GLOO_SOCKET_IFNAME": interface}
    if not is_loopback(address):
        wanted["NCCL_SOCKET_IFNAME"] = f"={interface}"  # "=": this name, not those that begin so
    return {name: value for name, value in wanted.items() if not env.get(name)}
