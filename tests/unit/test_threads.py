"""Plain functions run in threads that nobody joins, in a bounded number."""

import asyncio
import contextvars
import subprocess
import sys
import threading
import time

import pytest

from vime.plugins.threads import DaemonThreads, in_thread


def test_no_more_calls_run_at_once_than_there_are_threads():
    threads, running, most = DaemonThreads(3), [], []

    def call(i):
        running.append(i)
        most.append(len(running))
        time.sleep(0.005)
        running.remove(i)
        return i

    futures = [threads.submit(lambda i=i: call(i)) for i in range(30)]
    assert [future.result(30) for future in futures] == list(range(30))
    assert max(most) == 3


def test_a_call_that_was_cancelled_before_its_turn_never_starts():
    threads, gate, seen = DaemonThreads(1), threading.Event(), []
    first = threads.submit(lambda: gate.wait(30))
    second = threads.submit(lambda: seen.append(2))
    third = threads.submit(lambda: seen.append(3))
    assert second.cancel()
    gate.set()
    first.result(30)
    third.result(30)
    assert seen == [3]


def test_errors_and_context_variables_reach_the_function_and_back():
    name = contextvars.ContextVar("name")

    def fails():
        raise KeyError(name.get())

    async def call():
        name.set("mine")
        with pytest.raises(KeyError, match="mine"):
            await in_thread(fails)

    asyncio.run(call())


def test_a_call_that_never_returns_holds_neither_the_event_loop_nor_the_process_open():
    code = """
import asyncio, threading
from vime.plugins.threads import in_thread

async def main():
    try:
        await asyncio.wait_for(in_thread(threading.Event().wait), 0.05)
    except TimeoutError:
        print("late")

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, b"late\n")
