"""Hooks that kill the run's engine at given moments, each moment once.

Two environment variables hold rollout ids, separated by spaces:

LOSE_IN     the engine dies before the first request of these rollouts
LOSE_AFTER  the engine dies after the last answer of these rollouts

The processes of another node are out of reach here. `let_the_test_kill` waits until the test has
killed them.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from vime.addresses import host_and_port

_done: set[str] = set()


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """--custom-generate-function-path"""
    from vime.rollout.generation import generate

    _lose(args, "LOSE_IN", sample.rollout_id)
    return await generate(args, sample, sampling_params)


def after_rollout(args: Any, all_samples: Any, data_source: Any) -> None:
    """--rollout-all-samples-process-path"""
    _lose(args, "LOSE_AFTER", all_samples[0].rollout_id)


def let_the_test_kill(args: Any, all_samples: Any, data_source: Any) -> None:
    """--rollout-all-samples-process-path: writes the file `kill` once; waits until it is gone."""
    if "kill" not in _done:
        _done.add("kill")
        (note := Path(args.run_dir) / "kill").touch()
        while note.exists():
            time.sleep(0.1)


def _lose(args: Any, moment: str, rollout_id: int) -> None:
    name = f"{moment} {rollout_id}"
    if str(rollout_id) not in os.environ.get(moment, "").split() or name in _done:
        return
    _done.add(name)
    port = str(host_and_port(args.vllm_engine_urls[0])[1])
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    (server,) = [pid for pid in pids if _is_server(pid, port)]
    os.kill(server, signal.SIGKILL)


def _is_server(pid: int, port: str) -> bool:
    """Whether `pid` is a server. Its parent, the guard, has the same command line with a prefix."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        own, above = (_words(p) for p in (pid, parent))
    except OSError:
        return False
    return port in own and len(above) > len(own) and above[-len(own) :] == own


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
