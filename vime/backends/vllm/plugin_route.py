"""A faster route for the requests of a rollout: token ids in, packed arrays out.

vLLM's own /inference/v1/generate makes several Python objects per token, in the process that feeds
the engine: vLLM 0.25 builds a growing output in each step, and every release validates a model for
each log-probability. Here the server handles a request once, when its answer is complete.

The text comes with the tokens if a request has the header `TEXT`. A rollout has one client and
hundreds of engines, so the engines have more time for decoding.

Requests without the header `PACKED`, and servers that vime did not start, use vLLM's own route.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
import numpy as np

from vime.addresses import url_of
from vime.data import chat

logger = logging.getLogger(__name__)

# The same as in vime.rollout.wire.
PATH, PACKED, TEXT = "/inference/v1/generate", "x-vime-packed", "x-vime-text"
ALL, PLAIN = "all", "plain"
NEW_VERSION = "/update_weight_version"
MAGIC = b"vime\n"
JSON = [(b"content-type", b"application/json")]
BINARY = [(b"content-type", b"application/octet-stream")]
HEADER = (PACKED.encode(), b"1")


class Refused(Exception):
    """A request that would fail again if repeated: HTTP 400."""


class PackedAnswers:
    """ASGI middleware of vLLM's server (`--middleware`)."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.versions = TokenVersions()
        self.tokenizer: asyncio.Task[Any] | None = (
            None  # loads once, when the first answer needs it
        )

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        path = scope["path"] if scope["type"] == "http" else None
        engine = scope["app"].state.engine_client if path else None
        if path == NEW_VERSION and not hasattr(engine, "update_weight_version"):
            if (body := await _read(receive)) is not None:
                self.versions.begin(engine, int(msgspec.json.decode(body)["new_version"]))
                await _respond(send, 200, JSON, b"{}")
            return
        if path != PATH or HEADER not in scope["headers"]:
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        kind = dict(scope["headers"]).get(TEXT.encode(), b"").decode()
        url = url_of(*scope["server"]) if scope.get("server") else None
        text_of = partial(self._text, engine, kind)
        work = asyncio.ensure_future(_answer(engine, body, text_of, self.versions, url))
        left = asyncio.ensure_future(_client_left(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # the client has left, so the engine must stop
                return
            status, answer = work.result()
        finally:
            for task in (work, left):
                task.cancel()
        await _respond(send, status, BINARY if status == 200 else JSON, answer)

    async def _text(self, engine: Any, kind: str, token_ids: list[int]) -> str | None:
        """The text of an answer, as the client would decode it.

        None if nobody asked for it, or if the model's folder has no tokenizer.
        """
        if kind not in (ALL, PLAIN) or not token_ids:
            return None
        if self.tokenizer is None:
            work = asyncio.to_thread(_load_tokenizer, engine.model_config.tokenizer)
            self.tokenizer = asyncio.create_task(work)
        tokenizer = await asyncio.shield(self.tokenizer)
        if tokenizer is None:
            return None
        return chat.decode(tokenizer, token_ids, skip_special_tokens=kind == PLAIN)


class TokenVersions:
    """The weight version of each token, for vLLM 0.25, whose answers do not have it.

    An engine is frozen while it gets new weights. So the tokens that the server has at that time
    are from the old ones. vLLM sends outputs and answers of the engine through one socket, in
    order.
    """

    def __init__(self) -> None:
        self.version: int | None = None
        self.spans: dict[str, list[tuple[int, int]]] = {}  # {request: [(first token, version)]}

    def begin(self, engine: Any, version: int) -> None:
        """The engine has new weights."""
        self.version = version
        for state in engine.output_processor.request_states.values():
            if (spans := self.spans.get(state.external_req_id)) is not None:
                spans.append((state.detokenizer.num_output_tokens(), version))

    @contextmanager
    def of(self, request: str) -> Iterator[Callable[[int], list[dict] | None]]:
        """For the time of a request: its spans, given the number of its tokens."""
        if self.version is not None:
            self.spans[request] = [(0, self.version)]

        def spans(count: int) -> list[dict] | None:
            begun = self.spans.get(request, [])
            ends = [*(first for first, _ in begun), count][1:]
            return [
                {"version": str(version), "start": first, "end": end}
                for (first, version), end in zip(begun, ends, strict=True)
                if first < end
            ] or None

        try:
            yield spans
        finally:
            self.spans.pop(request, None)


def _load_tokenizer(folder: str) -> Any:
    try:
        return chat.load_tokenizer(folder)
    except Exception:
        logger.exception("no tokenizer in %s: the rollout decodes the answers itself", folder)
        return None


async def _read(receive: Any) -> bytes | None:
    """The request's body; None if the client left before it was complete."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _respond(send: Any, status: int, headers: list, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _client_left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(
    engine: Any,
    body: bytes,
    text_of: Callable[[list[int]], Awaitable[str | None]],
    versions: TokenVersions,
    url: str | None = None,
) -> tuple[int, bytes]:
    """Status and body. If the engine has died, vLLM's own watchdog ends the server."""
    try:
        prompt, params = parse(body)
        request = uuid.uuid4().hex
        with versions.of(request) as spans:
            try:
                (final,) = [o async for o in engine.generate(prompt, params, request)]
            except client_errors() as error:
                raise Refused(str(error)) from None
            (output,) = final.outputs
            own = spans(len(output.token_ids))
        return 200, pack(output, await text_of(list(output.token_ids)), own, url)
    except Refused as error:
        return 400, msgspec.json.encode({"error": str(error)})
    except Exception as error:
        logger.exception("a request failed in the engine")
        return 500, msgspec.json.encode({"error": f"{type(error).__name__}: {error}"})


def client_errors() -> tuple[type[Exception], ...]:
    """The errors for requests that vLLM cannot take: ValueError in 0.25, its own class in 0.32."""
    from vllm import exceptions

    return (ValueError, getattr(exceptions, "VLLMClientError", ValueError))


def parse(body: bytes) -> tuple[Any, Any]:
    """vLLM's prompt and SamplingParams; the router's own fields are ignored. Raises Refused."""
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    try:
        request = msgspec.json.decode(body)
        token_ids = msgspec.convert(request["token_ids"], list[int])
        given, salt = request["sampling_params"], request.get("cache_salt")
        if unknown := sorted(given.keys() - set(SamplingParams.__struct_fields__)):
            raise Refused(f"vLLM has no sampling parameter {', '.join(unknown)}")
        params = msgspec.convert(given, SamplingParams)
    except (*client_errors(), LookupError, TypeError, AttributeError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from None
    params.output_kind = RequestOutputKind.FINAL_ONLY
    params.flat_logprobs = True
    params.skip_clone = True
    return tokens_input(token_ids, cache_salt=salt), params


def pack(
    output: Any, text: str | None = None, own: list[dict] | None = None, url: str | None = None
) -> bytes:
    """A `CompletionOutput` of R tokens: `MAGIC`, a line of JSON, R int32 and R float32 values.

    own  the tokens' versions if the release of vLLM does not report them
    url  of this engine, because the router chose it
    """
    if output.finish_reason == "error":
        raise RuntimeError("the engine ended the request with an internal error")
    flat = output.logprobs
    log_probs = [flat.logprobs[start] for start in flat.start_indices] if flat else []
    spans = getattr(output, "weight_versions", None)  # vLLM 0.25 has none
    head = {
        "finish_reason": output.finish_reason,
        "num_tokens": len(output.token_ids),
        "weight_versions": own
        or (spans and [{"version": s.version, "start": s.start, "end": s.end} for s in spans]),
        "text": text,
        "engine": url,
    }
    arrays = np.asarray(output.token_ids, np.int32), np.asarray(log_probs, np.float32)
    return b"".join([MAGIC, msgspec.json.encode(head), b"\n", *(a.tobytes() for a in arrays)])
