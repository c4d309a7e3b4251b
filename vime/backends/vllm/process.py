"""A guarded child process in a group of its own, with its output in a log file."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from vime.backends.vllm import guard
from vime.errors import EngineError

TAIL_LINES = 30
STOP_PATIENCE_S = 10.0


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now; whoever binds it may still come too late."""
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


class GuardedProcess:
    """Lives no longer than its owner. `stop` ends its own process group and nothing else."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.begin = out.tell()  # earlier runs' lines come before
            self.guard = subprocess.Popen(
                [sys.executable, "-S", "-E", guard.__file__, *command],
                stdin=subprocess.PIPE,  # closes when we die
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # Ctrl-C in a terminal is the owner's business
            )

    @property
    def alive(self) -> bool:
        return self.guard.poll() is None

    def tail(self) -> str:
        """The end of the log, and where the rest is."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"last lines of {self.log}:", *lines])

    def output(self) -> str:
        """All that this process wrote."""
        with self.log.open("rb") as written:
            written.seek(self.begin)
            return written.read().decode(errors="replace")

    def check(self) -> None:
        """Raises EngineError when the process has ended."""
        if not self.alive:
            raise EngineError(f"{self.name} ended with code {self.guard.returncode}; {self.tail()}")

    def wait_until(self, ready, timeout_s: float, flag: str) -> None:
        """Poll `ready()`; raises EngineError when the process ends first or time runs out."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                self.stop()
                raise EngineError(
                    f"{self.name} was not healthy after {timeout_s:.0f} s; {flag} raises the "
                    f"deadline; {self.tail()}"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """SIGTERM to the group, a while, then SIGKILL to the group. Safe to call twice."""
        if self.guard.stdin:
            self.guard.stdin.close()  # the guard ends its group, politely first
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.guard.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.guard.wait(STOP_PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.guard.pid, signal.SIGKILL)
        self.guard.wait(STOP_PATIENCE_S)
