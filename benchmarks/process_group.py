"""A benchmark that was started in a group of its own (`start_new_session`), and what it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time

PATIENCE_S = 60.0  # for a group to end its own processes
LOOK_S = 0.2


def signal_group(process: subprocess.Popen, number: int) -> bool:
    """To the process and what it started; False once nothing of it is left."""
    process.poll()  # a zombie would still count
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_for_group(process: subprocess.Popen) -> int:
    """Until all of it has ended: what a benchmark started may end after the benchmark itself."""
    deadline = time.monotonic() + PATIENCE_S
    while signal_group(process, 0) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    signal_group(process, signal.SIGKILL)
    return process.wait()
