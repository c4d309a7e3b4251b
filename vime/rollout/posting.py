"""HTTP POST with retries: after a temporary error the request is repeated, within two limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

RETRY_WINDOW_S = 60.0  # requests fail when the server has been away for this long
CONNECT_TIMEOUT_S = 10.0
FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 2.0
HANDSHAKES, HANDSHAKES_S = 32, 0.01  # at most 32 new connections in 10 ms; vllm-router queues 128


class RequestFailed(Exception):
    """A request cannot succeed. Its sample fails with this reason."""


@dataclass(slots=True)
class Endpoint:
    """An address that takes POST requests.

    timeout_s       deadline of one request, retries included
    retry_window_s  the time that the server may be away
    """

    url: str
    timeout_s: float
    retry_window_s: float = RETRY_WINDOW_S
    num_retries: int = 0

    def session(self, headers: dict[str, str]) -> aiohttp.ClientSession:
        """A session for any number of requests at once. The caller closes it."""
        return aiohttp.ClientSession(
            connector=FewHandshakes(HANDSHAKES, HANDSHAKES_S),
            timeout=self._timeout(self.timeout_s),
            headers=headers,
        )

    def _timeout(self, total_s: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_TIMEOUT_S)

    async def post(
        self,
        session: aiohttp.ClientSession,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        stopped: Callable[[], bool],
    ) -> bytes | None:
        """The answer; None if a try failed and `stopped()` is true. Raises RequestFailed.

        The server counts as away while it accepts no connection and during the pauses between
        tries. It does not count as away while it works on a request, even if the request fails.
        """
        deadline = time.monotonic() + self.timeout_s
        away_s = 0.0
        backoff_s = FIRST_BACKOFF_S
        while True:
            begun = time.monotonic()
            try:
                timeout = self._timeout(max(deadline - begun, 0.001))  # 0 would be no limit
                async with session.post(
                    self.url, data=body, headers=headers, timeout=timeout
                ) as response:
                    answer = await response.read()
                if response.status == 200:
                    return answer
                reason = f"HTTP {response.status}: {answer[:300].decode(errors='replace')}"
                if response.status < 500:
                    raise RequestFailed(f"{self.url} refused the request: {reason}")
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                away_s += time.monotonic() - begun
                reason = f"{type(error).__name__}: {error}"
            except TimeoutError:
                raise self._overran() from None
            except aiohttp.ClientError as error:
                reason = f"{type(error).__name__}: {error}"
            if stopped():
                return None
            if away_s + backoff_s > self.retry_window_s:
                raise RequestFailed(f"{self.url} kept failing for {away_s:.0f} s; last: {reason}")
            if time.monotonic() + backoff_s > deadline:
                raise self._overran(f"; last: {reason}")
            self.num_retries += 1
            await asyncio.sleep(backoff_s)
            if stopped():
                return None
            away_s += backoff_s
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    def _overran(self, last: str = "") -> RequestFailed:
        return RequestFailed(
            f"{self.url} did not answer within {self.timeout_s:g} s "
            f"(--router-request-timeout-secs){last}"
        )


class FewHandshakes(aiohttp.TCPConnector):
    """Starts at most `at_once` connections in `each_s` seconds; any number may stay open.

    All requests of a rollout start at once. When the listener's queue is full the kernel drops
    handshakes, and their clients try again after 1 s and after 2 s more. The client cannot see the
    queue, so it gives the listener time. aiohttp's public way, tracing, adds 15% to each request.
    """

    def __init__(self, at_once: int, each_s: float, **options: Any) -> None:
        super().__init__(limit=0, **options)
        self.slots = asyncio.Semaphore(at_once)
        self.each_s = each_s

    async def _create_connection(self, *args: Any) -> Any:
        await self.slots.acquire()
        try:
            return await super()._create_connection(*args)
        finally:
            asyncio.get_running_loop().call_later(self.each_s, self.slots.release)
