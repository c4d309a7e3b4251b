"""A small process between an owner and its server. When the owner dies, it ends the server.

A script, run with a pipe from the owner as standard input: `guard.py COMMAND...`. It imports
nothing of vime, so it starts in milliseconds. It leads a process group, to which the server and
the server's children belong. The pipe closes when the owner is gone, even after SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PATIENCE_S = 5.0  # between SIGTERM and SIGKILL, once the owner is gone
POLL_S = 0.5
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def watch(command: list[str]) -> int:
    """Run `command` until it or the owner ends. Returns its exit code."""
    owner = os.getppid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the owner's signals come here too
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=follow_guard,
    )
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        if os.getppid() != owner or (readable and not os.read(sys.stdin.fileno(), 1)):
            end_group(server)
    return server.returncode


def follow_guard() -> None:
    """Runs in the server before it starts: restores SIGTERM and ties the server to the guard.

    Ray kills a lost actor's direct children by SIGKILL: the guard, but not the server.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()


def die_with_parent() -> None:
    """Ask Linux to kill this process as soon as its parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_group(server: subprocess.Popen) -> None:
    """Send SIGTERM to our own group, then SIGKILL, which ends this process too."""
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(watch(sys.argv[1:]))
