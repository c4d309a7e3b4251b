"""Retries of a POST: how long the server was away, and how long a request may take."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
import pytest

from vime.rollout.posting import Endpoint, RequestFailed


class Session:
    """Gives (seconds of work, status or error) one after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)

    @asynccontextmanager
    async def post(self, url, **kwargs):
        work_s, answer = self.answers.pop(0)
        await asyncio.sleep(work_s)
        if isinstance(answer, Exception):
            raise answer

        async def read():
            return b"text"

        yield SimpleNamespace(status=answer, read=read)


def post(endpoint, *answers):
    return asyncio.run(endpoint.post(Session(*answers), b"", stopped=lambda: False))


def test_a_server_that_worked_on_the_request_was_not_away():
    endpoint = Endpoint("http://here", timeout_s=60, retry_window_s=0.4)
    assert post(endpoint, (0, 503), (0.6, 500), (0, 200)) == b"text"
    assert endpoint.num_retries == 2


def test_time_without_a_connection_counts_as_away():
    refused = aiohttp.ClientConnectorError(
        SimpleNamespace(host="here", port=1, ssl=True), OSError("no")
    )
    endpoint = Endpoint("http://here", timeout_s=60, retry_window_s=0.4)
    with pytest.raises(RequestFailed, match="kept failing"):
        post(endpoint, (0, 503), (0.6, refused), (0, 200))


def test_a_connection_that_takes_too_long_is_tried_again():
    endpoint = Endpoint("http://here", timeout_s=60)
    assert post(endpoint, (0, aiohttp.ConnectionTimeoutError("10 s")), (0, 200)) == b"text"


def test_retries_end_by_the_requests_deadline():
    endpoint = Endpoint("http://here", timeout_s=0.25)
    with pytest.raises(RequestFailed, match="within 0.25 s .*-timeout-secs.*; last: HTTP 500"):
        post(endpoint, (0, 500), (0, 500), (0, 500), (0, 500))
