"""The code that looks around on a node before a run starts there.

It needs the standard library only and travels by value, so it also runs on a node that has no vime,
or another vime. Its answers are plain dicts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

MOST_FILES = 10_000  # of a folder, in the order of their names
READ_BYTES = 1 << 20  # smaller files are compared by content, if they are text
TEXT = (".json", ".txt", ".jinja", ".model", ".yaml")
TOKEN_PATIENCE_S = 5.0  # a network file system may show a new file late
CONNECT_TIMEOUT_S = 3.0


class NodeProbe:
    """One on each node: `look`, then `reach` the others, whose probes listen meanwhile."""

    def look(
        self,
        *,
        folder: str,
        address: str,
        interface: str | None,
        packages: list[str],
        paths: list[str],
        tokens: list[str],
        modules: list[str],
    ) -> dict:
        """
        folder     the driver's current folder, in which relative paths begin
        address    the address that Ray uses for the node
        interface  --node-interface; its address replaces Ray's
        packages   their versions are reported
        paths      to compare with the driver's
        tokens     files that the driver has just written
        modules    of the user's functions; the digest of their source is reported
        """
        if os.path.isdir(folder):
            os.chdir(folder)
        address, port, problem = self._listen(address, interface)
        return {
            "cores": len(os.sched_getaffinity(0)),
            "address": address,
            "port": port,
            "problem": problem,
            "versions": {"Python": ".".join(map(str, sys.version_info[:2]))}
            | {name: version_of(name) for name in packages},
            "vime": digest_of_package("vime"),
            "paths": {path: sight_of(Path(folder, path)) for path in paths},
            "tokens": {path: state_of_token(path) for path in tokens},
            "modules": {name: digest_of_module(name) for name in modules},
        }

    def _listen(self, address: str, interface: str | None) -> tuple[str, int, str | None]:
        """Accepts connections until the probe ends. Returns address, port and the problem."""
        try:
            if interface is not None:
                from vime.addresses import address_of  # a node without vime is refused anyway

                address = address_of(interface)
            family = socket.getaddrinfo(address, 0)[0][0]
            server = socket.create_server((address, 0), family=family, backlog=1024)
        except Exception as error:
            return address, 0, str(error)

        def accept() -> None:
            while True:
                server.accept()[0].close()

        threading.Thread(target=accept, daemon=True).start()
        return address, server.getsockname()[1], None

    def reach(self, others: list[tuple[str, str, int]]) -> dict[str, str]:
        """{node: why it cannot be reached}, for others as (node, address, port)."""

        def attempt(other: tuple[str, str, int]) -> str | None:
            try:
                socket.create_connection(other[1:], CONNECT_TIMEOUT_S).close()
            except OSError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(64) as pool:
            found = zip(others, pool.map(attempt, others), strict=True)
            return {other[0]: why for other, why in found if why is not None}


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest_of_package(name: str) -> str | None:
    """A digest of a package's Python files; None if the package cannot be found."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    root = Path(next(iter(found.submodule_search_locations)))
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def digest_of_module(name: str) -> str | None:
    """A digest of a module's file; None if the module cannot be found."""
    try:
        found = importlib.util.find_spec(name)
        return found and hashlib.sha256(Path(str(found.origin)).read_bytes()).hexdigest()
    except Exception:  # it imports the packages around the module, which may raise any error
        return None


def sight_of(path: Path) -> dict[str, str] | None:
    """{file: its size, and a digest of small text files}; None if the path does not exist."""
    if not path.exists():
        return None
    if path.is_file():
        return {path.name: _seen(path)}
    names = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    files = sorted(name for name in names if not _is_beside_the_point(name))[:MOST_FILES]
    return {str(name): _seen(path / name) for name in files}


def _is_beside_the_point(name: Path) -> bool:
    """Hidden files, such as a download's cache, and descriptions. A copy may lack them."""
    return name.suffix == ".md" or any(part.startswith(".") for part in name.parts)


def _seen(file: Path) -> str:
    size = file.stat().st_size
    if file.suffix in TEXT and size <= READ_BYTES:
        return f"{size} bytes, {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    return f"{size} bytes"


def state_of_token(path: str) -> str:
    """ "writable", "read-only" (the folder is, for this node) or "missing"."""
    deadline = time.monotonic() + TOKEN_PATIENCE_S
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            return "missing"
        time.sleep(0.2)
    return "writable" if os.access(os.path.dirname(path), os.W_OK) else "read-only"
