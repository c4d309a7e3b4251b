"""Worker processes that grade under a deadline. A process that hangs is ended and replaced."""

from __future__ import annotations

import atexit
import base64
import json
import os
import pickle
import select
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue
from typing import Any

from vime.rollout.rm_hub.grader import GradingFailed, GradingTimeout

START_TIMEOUT_S = 120.0  # importing sympy takes long on a busy machine


class GraderPool:
    """`num_workers` processes that start when needed. Any thread or event loop may use the pool."""

    def __init__(self, num_workers: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="grader")
        self._idle: SimpleQueue[_Worker | None] = SimpleQueue()
        for _ in range(num_workers):
            self._idle.put(None)

    def submit(
        self, grader: str, response: str, label: str | None, metadata: dict[str, Any]
    ) -> Future:
        """The reward from the grader with this name. The future raises GradingFailed.

        Label and metadata arrive with their types: Parquet rows hold dates, Decimals and bytes.
        Raises GradingFailed if a value cannot be sent to a process.
        """
        try:
            task = base64.b64encode(pickle.dumps((grader, response, label, metadata)))
        except Exception as error:  # pickle raises errors of many types
            raise GradingFailed(
                f"label or metadata cannot be sent to a grader process: {error}"
            ) from None
        return self._threads.submit(self._run, task)

    def _run(self, task: bytes) -> float | dict[str, Any]:
        worker = self._idle.get()  # never empty: there are as many workers as threads
        try:
            if worker is None or not worker.is_alive:
                worker = _Worker()
            answer = worker.ask(task, self.timeout_s)
        except Exception:
            if worker is not None:
                worker.stop()
            worker = None
            raise
        finally:
            self._idle.put(worker)
        if "failure" in answer:
            raise GradingFailed(answer["failure"])
        return answer["reward"]

    def close(self) -> None:
        """Ends the processes. Answers that are being graded fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        while not self._idle.empty():
            worker = self._idle.get()
            if worker is not None:
                worker.stop()


class _Worker:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vime.rollout.rm_hub.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        self._read = b""
        try:
            self._line(START_TIMEOUT_S)
        except GradingFailed as error:
            self.stop()
            raise GradingFailed(f"a grader process did not start: {error}") from None

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, task: bytes, timeout_s: float) -> dict[str, Any]:
        try:
            self._process.stdin.write(b"%g %b\n" % (timeout_s, task))
            self._process.stdin.flush()
        except OSError as error:
            raise GradingFailed(f"the grader process is gone: {error}") from None
        return json.loads(self._line(timeout_s))

    def _line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        out = self._process.stdout.fileno()
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise GradingTimeout(
                    f"grading took longer than {timeout_s:g} s (--rm-timeout-secs)"
                )
            part = os.read(out, 1 << 16)
            if not part:
                code = self._process.wait(timeout=10)
                raise GradingFailed(f"the grader process ended with code {code}")
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(timeout=10)
        self._process.stdin.close()
        self._process.stdout.close()


@cache
def shared_pool(num_workers: int, timeout_s: float) -> GraderPool:
    """The one pool of this process with these settings. It closes at exit."""
    pool = GraderPool(num_workers, timeout_s)
    atexit.register(pool.close)
    return pool
