"""The format of `POST /inference/v1/generate`: token ids in, token ids and log-probabilities out.

Only this file knows how the answers of engine versions differ. vLLM 0.32 reports the weight version
of each token. vLLM 0.25 does not, so its tokens get UNKNOWN_VERSION. Engines that vime starts
answer with arrays if a request has the header `PACKED` (`vime.backends.vllm.plugin_route`). Other
engines ignore the header and answer as vLLM does.
"""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vime.types import Status

try:
    import orjson

    dumps, loads = orjson.dumps, orjson.loads
except ImportError:
    loads = json.loads

    def dumps(value: Any) -> bytes:
        return json.dumps(value).encode()


PATH = "/inference/v1/generate"
PACKED = "x-vime-packed"  # a header; ASGI passes headers in lower case
UNKNOWN_VERSION = -1
LEAST_LOG_PROB = -9999.0  # the engine sends this in place of NaN and -inf

STATUS_OF = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


class WireError(ValueError):
    """An answer lacks something that training needs."""


@dataclass(slots=True)
class Generation:
    """An answer of R tokens. `log_probs` and `weight_versions` have R entries, too."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    status: Status = Status.ABORTED


def build_request(token_ids: list[int], sampling_params: dict[str, Any]) -> bytes:
    """The body of a request. The engine decodes text only if stop strings need it."""
    params = {k: v for k, v in sampling_params.items() if v is not None}
    params |= {"logprobs": 0, "detokenize": bool(params.get("stop")), "n": 1}
    return dumps({"token_ids": token_ids, "sampling_params": params})


def parse_response(body: bytes, known_version: int | None = None) -> Generation:
    """Reads an answer, packed or in vLLM's own format.

    known_version  the version for tokens whose version the engine does not report
    Raises WireError on an answer without a log-probability for every token.
    """
    try:
        answer = loads(body)
        token_ids, log_probs, spans, reason = (_stock if "choices" in answer else _packed)(answer)
    except (ValueError, LookupError, TypeError) as error:
        raise WireError(f"not an answer of {PATH}: {error!r} in {body[:200]!r}") from None
    if reason not in STATUS_OF:
        raise WireError(f"the engine ended the request with finish_reason {reason!r}")
    if len(log_probs) != len(token_ids):
        raise WireError(f"{len(token_ids)} tokens came with {len(log_probs)} log-probabilities")
    if not (np.asarray(log_probs, np.float32) > LEAST_LOG_PROB).all():  # false for NaN, too
        raise WireError("a sampled token came with no finite log-probability")
    versions = _versions(spans, len(token_ids), known_version)
    return Generation(token_ids, log_probs, versions, STATUS_OF[reason])


def _stock(answer: dict) -> tuple[list[int], list[float], list[dict] | None, str]:
    choice = answer["choices"][0]
    content = (choice.get("logprobs") or {}).get("content") or []
    log_probs = [entry["logprob"] for entry in content]
    reason = choice["finish_reason"]
    return choice.get("token_ids") or [], log_probs, choice.get("weight_versions"), reason


def _packed(answer: dict) -> tuple[list[int], list[float], list[dict] | None, str]:
    token_ids = np.frombuffer(b64decode(answer["token_ids"]), np.int32).tolist()
    log_probs = np.frombuffer(b64decode(answer["log_probs"]), np.float32).tolist()
    return token_ids, log_probs, answer.get("weight_versions"), answer["finish_reason"]


def _versions(spans: list[dict] | None, count: int, known_version: int | None) -> list[int]:
    """One version per token, from spans [start, end). A label that is not a number is unknown."""
    default = UNKNOWN_VERSION if known_version is None else known_version
    versions = [default] * count
    for span in spans or ():
        try:
            version = int(span["version"])
        except ValueError:
            continue
        start, end = span["start"], min(span["end"], count)
        versions[start:end] = [version] * (end - start)
    return versions
