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
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np

from vime.data import chat

logger = logging.getLogger(__name__)

# The same as in vime.rollout.wire.
PATH, PACKED, TEXT = "/inference/v1/generate", "x-vime-packed", "x-vime-text"
ALL, PLAIN = "all", "plain"
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
        self.tokenizer: asyncio.Task[Any] | None = (
            None  # loads once, when the first answer needs it
        )

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or HEADER not in scope["headers"]:
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        engine = scope["app"].state.engine_client
        kind = dict(scope["headers"]).get(TEXT.encode(), b"").decode()
        work = asyncio.ensure_future(_answer(engine, body, partial(self._text, engine, kind)))
        left = asyncio.ensure_future(_client_left(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # the client has left, so the engine must stop
                return
            status, answer = work.result()
        finally:
            for task in (work, left):
                task.cancel()
        headers = BINARY if status == 200 else JSON
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

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


async def _client_left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(
    engine: Any, body: bytes, text_of: Callable[[list[int]], Awaitable[str | None]]
) -> tuple[int, bytes]:
    """Status and body. If the engine has died, vLLM's own watchdog ends the server."""
    try:
        prompt, params = parse(body)
        try:
            (final,) = [o async for o in engine.generate(prompt, params, uuid.uuid4().hex)]
        except client_errors() as error:
            raise Refused(str(error)) from None
        (output,) = final.outputs
        return 200, pack(output, await text_of(list(output.token_ids)))
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
        given = request["sampling_params"]
        if unknown := sorted(given.keys() - set(SamplingParams.__struct_fields__)):
            raise Refused(f"vLLM has no sampling parameter {', '.join(unknown)}")
        params = msgspec.convert(given, SamplingParams)
    except (*client_errors(), LookupError, TypeError, AttributeError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from None
    params.output_kind = RequestOutputKind.FINAL_ONLY
    params.flat_logprobs = True
    params.skip_clone = True
    return tokens_input(token_ids), params


def pack(output: Any, text: str | None = None) -> bytes:
    """A `CompletionOutput` of R tokens: `MAGIC`, a line of JSON, R int32 and R float32 values."""
    if output.finish_reason == "error":
        raise RuntimeError("the engine ended the request with an internal error")
    flat = output.logprobs
    log_probs = [flat.logprobs[start] for start in flat.start_indices] if flat else []
    spans = getattr(output, "weight_versions", None)  # vLLM 0.25 has none
    head = {
        "finish_reason": output.finish_reason,
        "num_tokens": len(output.token_ids),
        "weight_versions": spans
        and [{"version": s.version, "start": s.start, "end": s.end} for s in spans],
        "text": text,
    }
    arrays = np.asarray(output.token_ids, np.int32), np.asarray(log_probs, np.float32)
    return b"".join([MAGIC, msgspec.json.encode(head), b"\n", *(a.tobytes() for a in arrays)])
