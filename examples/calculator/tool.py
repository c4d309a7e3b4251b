"""A calculator for a model, in its own process and with limits."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

PROGRAM = Path(__file__).with_name("tool_process.py")
LONGEST_RESULT = 64  # characters that go back to the model


class Calculator:
    """Starts its process at the first expression, and a new one after an expression broke a limit.

    timeout_s  wall-clock limit of one expression; also its CPU limit, rounded to whole seconds
    memory     limit of the address space, bytes
    """

    def __init__(self, timeout_s: float = 1.0, memory: int = 256 << 20) -> None:
        self.timeout_s, self.memory = timeout_s, memory
        self._lock = threading.Lock()  # many samples call from their own threads
        self._process: subprocess.Popen | None = None

    def run(self, expression: str) -> str:
        """The text for the model: a number, or "error: " and the reason. Never raises."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._start()
            try:
                self._process.stdin.write(json.dumps(expression).encode() + b"\n")
                self._process.stdin.flush()
                line = self._line()
            except OSError:
                line = b""
            if not line:
                self.close()
                return "error: limit"
        said = json.loads(line)
        text = said.get("result") or f"error: {said['error']}"
        return text if len(text) <= LONGEST_RESULT else "error: too long"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _start(self) -> None:
        limits = [str(max(1, round(self.timeout_s))), str(self.memory)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(PROGRAM), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
        )

    def _line(self) -> bytes:
        """The process's answer; b"" after the time limit or the death of the process."""
        out, read = self._process.stdout, b""
        deadline = time.monotonic() + self.timeout_s
        while not read.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                return b""
            part = out.read1(1 << 16)
            if not part:
                return b""
            read += part
        return read
