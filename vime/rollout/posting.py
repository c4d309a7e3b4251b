"""POST until a server answers: errors that can pass are tried again, within two limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

RETRY_WINDOW_S = 60.0  # how long a server may be away before its requests count as failed
FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 2.0


class RequestFailed(Exception):
    """A request that will not succeed; its sample is failed with this reason."""


@dataclass(slots=True)
class Endpoint:
    """One address.

    timeout_s       deadline of one request, retries included
    retry_window_s  how long its server may be away
    """

    url: str
    timeout_s: float
    retry_window_s: float = RETRY_WINDOW_S
    num_retries: int = 0

    async def post(
        self,
        session: aiohttp.ClientSession,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        stopped: Callable[[], bool],
    ) -> bytes | None:
        """The answer; None where a try failed and `stopped()`. Raises RequestFailed.

        session  its own total timeout is `timeout_s`
        """
        deadline = time.monotonic() + self.timeout_s
        away_since: float | None = None
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                async with session.post(self.url, data=body, headers=headers) as response:
                    answer = await response.read()
                if response.status == 200:
                    return answer
                reason = f"HTTP {response.status}: {answer[:300].decode(errors='replace')}"
                if response.status < 500:
                    raise RequestFailed(f"{self.url} refused the request: {reason}")
            except TimeoutError:
                raise RequestFailed(
                    f"{self.url} did not answer within {self.timeout_s:g} s "
                    "(--router-request-timeout-secs)"
                ) from None
            except aiohttp.ClientError as error:
                reason = f"{type(error).__name__}: {error}"
            if stopped():
                return None
            now = time.monotonic()
            away_since = away_since or now
            if min(deadline, away_since + self.retry_window_s) < now + backoff_s:
                raise RequestFailed(
                    f"{self.url} kept failing for {now - away_since:.0f} s; last: {reason}"
                )
            self.num_retries += 1
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
