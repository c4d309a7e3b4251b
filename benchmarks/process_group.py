"""Signals for a process group: a benchmark started with `start_new_session`, and its children."""

from __future__ import annotations

import os
import signal
import subprocess
import time

PATIENCE_S = 60.0  # a group has this long to end its own processes
LOOK_S = 0.2


def signal_group(process: subprocess.Popen, number: int) -> bool:
    """Sends a signal to the process and its children; False if none of them is left."""
    process.poll()  # otherwise a zombie would count
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_for_group(process: subprocess.Popen) -> int:
    """Waits until the whole group has ended; children may end after the benchmark itself."""
    deadline = time.monotonic() + PATIENCE_S
    while signal_group(process, 0) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    signal_group(process, signal.SIGKILL)
    return process.wait()
