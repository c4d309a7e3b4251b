"""The HTTP client of a rollout: one session, limits on concurrency and retries, aborts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp

from vime.errors import EngineError
from vime.number_lists import distinct
from vime.observe import spans
from vime.rollout import wire
from vime.rollout.posting import RETRY_WINDOW_S, Endpoint, RequestFailed
from vime.rollout.wire import Generation, WireError

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 30.0
SESSION_HEADER = "x-session-id"


class GenerateClient:
    """Posts requests to the router. Posts aborts to every engine, because the router picks one.

    router_url     http://host:port
    engine_urls    the engines behind the router
    concurrency    maximum number of requests in flight
    timeout_s      deadline of one request, retries included
    api_key        the key of engines that run with --vllm-api-key or VLLM_API_KEY
    cache_salt     requests with different salts share no cached prefix. It may change at any time
    purpose        the name of the requests in the timeline
    """

    def __init__(
        self,
        router_url: str,
        engine_urls: tuple[str, ...] = (),
        *,
        concurrency: int,
        timeout_s: float,
        api_key: str | None = None,
        cache_salt: str | None = None,
        purpose: str = "generate",
        retry_window_s: float = RETRY_WINDOW_S,
    ) -> None:
        self.endpoint = Endpoint(router_url.rstrip("/") + wire.PATH, timeout_s, retry_window_s)
        self.engine_urls = engine_urls
        self.headers = {"Content-Type": "application/json", wire.PACKED: "1"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.aborting = False
        self.cache_salt = cache_salt
        self.purpose = purpose
        self._slots = asyncio.Semaphore(concurrency)
        self._num_in_flight = 0
        self._none_in_flight = asyncio.Event()
        self._none_in_flight.set()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> GenerateClient:
        self._session = self.endpoint.session(self.headers)
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._session.close()

    async def generate(
        self,
        token_ids: list[int],
        sampling_params: dict[str, Any],
        session_id: str | None = None,
        text: str | None = None,
        version: int | None = None,
    ) -> Generation:
        """One answer. After `abort`, sends nothing and returns an empty answer with status ABORTED.

        session_id  a --vllm-router-policy with sessions sends all requests of a session to the
                    engine that has their prefix in its cache
        text        wire.ALL or wire.PLAIN: ask for the text, too
        version     the weights that made the first of `token_ids`; None: the present ones. It takes
                    the place of the salt, so a request that goes on finds its prefix in the cache
        Raises RequestFailed.
        """
        async with self._slots:
            if self.aborting:
                return Generation()
            headers = {SESSION_HEADER: session_id, wire.TEXT: text}
            began = spans.now()
            with self._in_flight():
                answer = await self.endpoint.post(
                    self._session,
                    wire.build_request(token_ids, sampling_params, self._salt(version)),
                    {name: value for name, value in headers.items() if value},
                    stopped=lambda: self.aborting,
                )
        if answer is None:
            return Generation()
        try:
            generation = wire.parse_response(answer)
        except WireError as error:
            raise RequestFailed(f"{self.endpoint.url}: {error}") from None
        if spans.recording():
            self._record(began, session_id, generation)
        return generation

    def _record(self, began: float, session_id: str | None, generation: Generation) -> None:
        """A span of the engine that answered. Engines that vime did not start do not say which."""
        known = generation.engine in self.engine_urls
        track = f"engine {self.engine_urls.index(generation.engine)}" if known else "engines"
        versions = sorted(distinct(generation, "weight_versions"))
        args = {"sample": session_id, "tokens": len(generation), "versions": versions}
        spans.add(self.purpose, began, track, **args)

    def _salt(self, version: int | None) -> str | None:
        return self.cache_salt if self.cache_salt is None or version is None else str(version)

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        self._num_in_flight += 1
        self._none_in_flight.clear()
        try:
            yield
        finally:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._none_in_flight.set()

    async def abort(self, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Stops every request, whether it was sent or not. Returns when none is in flight.

        Repeats the abort at the engines until then, because a request may still be on its way
        through the router. Raises EngineError when an engine refuses, or when requests still run
        after `timeout_s`.
        """
        self.aborting = True
        deadline = time.monotonic() + timeout_s
        pause_s = 0.05
        while True:
            await asyncio.gather(*map(self._abort_engine, self.engine_urls))
            try:
                await asyncio.wait_for(self._none_in_flight.wait(), pause_s)
                return
            except TimeoutError:
                pause_s = min(2 * pause_s, 1.0)
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self._num_in_flight} requests were still running {timeout_s:g} s after the "
                    f"engines {', '.join(self.engine_urls) or '(none known)'} were told to abort "
                    "them."
                )

    async def _abort_engine(self, url: str) -> None:
        for path in ("/pause?mode=abort&clear_cache=false", "/resume"):
            try:
                timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)
                async with self._session.post(url + path, timeout=timeout) as response:
                    if response.status != 200:
                        text = (await response.text())[:300]
                        raise EngineError(f"{url}{path} answered {response.status}: {text}")
            except (aiohttp.ClientError, TimeoutError) as error:
                raise EngineError(
                    f"{url}{path} failed while aborting requests: {type(error).__name__}: {error}"
                ) from None
