"""A faster route for the requests of a rollout: token ids in, packed arrays out.

vLLM's own /inference/v1/generate makes several Python objects per token, in the process that feeds
the engine: vLLM 0.25 builds a growing output in each step, and every release validates a model for
each log-probability. Here the server handles a request once, when its answer is complete.

Requests without the header `PACKED`, and servers that vime did not start, use vLLM's own route.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from base64 import b64encode
from typing import Any

import msgspec
import numpy as np

logger = logging.getLogger(__name__)

PATH, PACKED = "/inference/v1/generate", "x-vime-packed"  # the same as in vime.rollout.wire
JSON = [(b"content-type", b"application/json")]
HEADER = (PACKED.encode(), b"1")


class Refused(Exception):
    """A request that would fail again if repeated: HTTP 400."""


class PackedAnswers:
    """ASGI middleware of vLLM's server (`--middleware`)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or HEADER not in scope["headers"]:
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        work = asyncio.ensure_future(_answer(scope["app"].state.engine_client, body))
        left = asyncio.ensure_future(_client_left(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # the client has left, so the engine must stop
                return
            status, answer = work.result()
        finally:
            for task in (work, left):
                task.cancel()
        await send({"type": "http.response.start", "status": status, "headers": JSON})
        await send({"type": "http.response.body", "body": answer})


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


async def _answer(engine: Any, body: bytes) -> tuple[int, bytes]:
    """Status and body. If the engine has died, vLLM's own watchdog ends the server."""
    try:
        prompt, params = parse(body)
        try:
            (final,) = [o async for o in engine.generate(prompt, params, uuid.uuid4().hex)]
        except client_errors() as error:
            raise Refused(str(error)) from None
        return 200, pack(final.outputs[0])
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


def pack(output: Any) -> bytes:
    """A `CompletionOutput` of R tokens as JSON: R int32 and R float32 values in base64."""
    if output.finish_reason == "error":
        raise RuntimeError("the engine ended the request with an internal error")
    flat = output.logprobs
    log_probs = [flat.logprobs[start] for start in flat.start_indices] if flat else []
    spans = getattr(output, "weight_versions", None)  # vLLM 0.25 has none
    return msgspec.json.encode(
        {
            "finish_reason": output.finish_reason,
            "token_ids": b64encode(np.asarray(output.token_ids, np.int32)).decode(),
            "log_probs": b64encode(np.asarray(log_probs, np.float32)).decode(),
            "weight_versions": spans
            and [{"version": s.version, "start": s.start, "end": s.end} for s in spans],
        }
    )
