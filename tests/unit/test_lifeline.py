"""An engine over several nodes ends as soon as one of its parts has ended."""

from __future__ import annotations

import socket
import threading

import pytest

from vime.backends.vllm import lifeline


@pytest.fixture
def line():
    made = lifeline.Lifeline("127.0.0.1")
    yield made
    made.close()


def test_the_end_of_one_part_is_noticed(line):
    lost, ends = threading.Event(), [threading.Event(), threading.Event()]
    line.watch(lost.set)
    for end in ends:
        lifeline.hold("127.0.0.1", line.port, line.token, end.wait)
    assert not lost.wait(0.2)
    ends[1].set()
    assert lost.wait(10)
    ends[0].set()


def test_the_end_after_close_is_in_order(line):
    lost, end = threading.Event(), threading.Event()
    line.watch(lost.set)
    lifeline.hold("127.0.0.1", line.port, line.token, end.wait)
    line.close()
    line.close()
    end.set()
    assert not lost.wait(0.3)


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"]
)
def test_a_stranger_s_connection_does_not_count(line, said):
    lost = threading.Event()
    line.watch(lost.set)
    with socket.create_connection(("127.0.0.1", line.port)) as stranger:
        stranger.sendall(said)
    assert not lost.wait(0.3)


def test_a_part_that_cannot_reach_the_first_is_told(line):
    line.close()
    with pytest.raises(ConnectionRefusedError):
        lifeline.hold("127.0.0.1", line.port, line.token, threading.Event().wait)
