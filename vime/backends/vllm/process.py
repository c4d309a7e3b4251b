"""A guarded child process in its own process group, with its output in a log file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from vime.addresses import listening
from vime.backends.vllm import guard
from vime.errors import EngineError

TAIL_LINES = 30
STOP_PATIENCE_S = 10.0


class GuardedProcess:
    """A process that ends with its owner. `stop` ends its process group and nothing else."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.begin = out.tell()  # the file may hold lines of earlier runs
            self.guard = subprocess.Popen(
                [sys.executable, "-S", "-E", guard.__file__, *command],
                stdin=subprocess.PIPE,  # closes when this process dies
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # Ctrl-C in a terminal reaches the owner only
            )

    @property
    def alive(self) -> bool:
        return self.guard.poll() is None

    def tail(self) -> str:
        """The end of the log, with its path."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"last lines of {self.log}:", *lines])

    def output(self) -> str:
        """All output of this process."""
        with self.log.open("rb") as written:
            written.seek(self.begin)
            return written.read().decode(errors="replace")

    def check(self) -> None:
        """Raises EngineError when the process has ended."""
        if not self.alive:
            raise EngineError(f"{self.name} ended with code {self.guard.returncode}; {self.tail()}")

    def serves(self, host: str, port: int) -> bool:
        """Whether this process, or a child of it, accepts connections at this address.

        Another program may have taken the port first, and its answers may look healthy, too.
        """
        if not listening(host, port):  # a cheap test, which fails for most of a server's start
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            guard = psutil.Process(self.guard.pid)
            return any(_listens(p, port) for p in (guard, *guard.children(recursive=True)))
        return False

    def wait_until(
        self, ready: Callable[[], bool], timeout_s: float, flag: str | None = None
    ) -> None:
        """Poll `ready()`. Raises EngineError when the process ends first or time runs out.

        flag  the flag that raises the deadline
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                self.stop()
                remedy = f"; {flag} raises the deadline" if flag else ""
                raise EngineError(
                    f"{self.name} was not healthy after {timeout_s:.0f} s{remedy}; {self.tail()}"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """Send SIGTERM to the group, and SIGKILL after STOP_PATIENCE_S. Safe to call twice."""
        if self.guard.stdin:
            self.guard.stdin.close()  # the guard then ends its group, with SIGTERM first
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.guard.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.guard.wait(STOP_PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.guard.pid, signal.SIGKILL)
        self.guard.wait(STOP_PATIENCE_S)


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        sockets = process.net_connections("tcp")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)
