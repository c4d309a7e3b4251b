"""The format of `POST /inference/v1/generate`: token ids in, token ids and log-probabilities out.

Engines that vime starts answer with arrays if a request has the header `PACKED`
(`vime.backends.vllm.plugin_route`), and with the text if it has the header `TEXT`. Other engines
ignore the headers and answer as vLLM does. A token whose weight version they do not report gets
UNKNOWN_VERSION.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vime.number_lists import Numbers, Runs, number_lists, stored
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
TEXT = "x-vime-text"  # ask for the text: ALL of it, or PLAIN without special tokens
ALL, PLAIN = "all", "plain"
MAGIC = b"vime\n"  # the beginning of a packed answer
UNKNOWN_VERSION = -1
LEAST_LOG_PROB = -9999.0  # the engine sends this in place of NaN and -inf

STATUS_OF = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


class WireError(ValueError):
    """An answer lacks something that training needs."""


@number_lists("token_ids", "log_probs", "weight_versions")
@dataclass(slots=True)
class Generation:
    """An answer of R tokens. `log_probs` and `weight_versions` have R entries, too.

    text  of these tokens; None if the engine was not asked for it or cannot give it
    engine  its URL; None if it does not say
    """

    token_ids: list[int] | Numbers = field(default_factory=list)
    log_probs: list[float] | Numbers = field(default_factory=list)
    weight_versions: list[int] | Runs = field(default_factory=list)
    status: Status = Status.ABORTED
    text: str | None = None
    engine: str | None = None

    def __len__(self) -> int:
        return len(stored(self, "token_ids"))


def build_request(
    token_ids: list[int], sampling_params: dict[str, Any], cache_salt: str | None = None
) -> bytes:
    """The body of a request. The engine decodes text only if stop strings need it."""
    params = {k: v for k, v in sampling_params.items() if v is not None}
    params |= {"logprobs": 0, "detokenize": bool(params.get("stop")), "n": 1}
    request = {"token_ids": token_ids, "sampling_params": params}
    if cache_salt is not None:
        request["cache_salt"] = cache_salt
    return dumps(request)


def parse_response(body: bytes) -> Generation:
    """Reads an answer, packed or in vLLM's own format.

    Raises WireError on an answer without a log-probability for every token.
    """
    try:
        read = _packed if body.startswith(MAGIC) else _stock
        token_ids, log_probs, spans, reason, text, engine = read(body)
    except (ValueError, LookupError, TypeError) as error:
        raise WireError(f"not an answer of {PATH}: {error!r} in {body[:200]!r}") from None
    if reason not in STATUS_OF:
        raise WireError(f"the engine ended the request with finish_reason {reason!r}")
    if len(log_probs) != len(token_ids):
        raise WireError(f"{len(token_ids)} tokens came with {len(log_probs)} log-probabilities")
    values = log_probs.values if isinstance(log_probs, Numbers) else log_probs
    if not np.asarray(values, np.float32).min(initial=0.0) > LEAST_LOG_PROB:  # false for NaN, too
        raise WireError("a sampled token came with no finite log-probability")
    versions = _versions(spans, len(token_ids))
    return Generation(token_ids, log_probs, versions, STATUS_OF[reason], text, engine)


_Parts = tuple[list | Numbers, list | Numbers, list[dict] | None, str, str | None, str | None]


def _stock(body: bytes) -> _Parts:
    choice = loads(body)["choices"][0]
    content = (choice.get("logprobs") or {}).get("content") or []
    log_probs = [entry["logprob"] for entry in content]
    spans = choice.get("weight_versions")
    return choice.get("token_ids") or [], log_probs, spans, choice["finish_reason"], None, None


def _packed(body: bytes) -> _Parts:
    """`MAGIC`, a line of JSON, then R int32 token ids and the float32 log-probabilities."""
    end = body.index(b"\n", len(MAGIC))
    head = loads(body[len(MAGIC) : end])
    count, first = head["num_tokens"], end + 1
    token_ids = Numbers(np.frombuffer(body, np.int32, count, first).copy())
    log_probs = Numbers(np.frombuffer(body, np.float32, offset=first + 4 * count).copy())
    reason, text, engine = head["finish_reason"], head.get("text"), head.get("engine")
    return token_ids, log_probs, head.get("weight_versions"), reason, text, engine


def _versions(spans: list[dict] | None, count: int) -> Runs:
    """One version per token, from spans [start, end). A label that is not a number is unknown."""
    values, counts, at = [], [], 0

    def add(version: int, end: int) -> None:
        nonlocal at
        if end > at:
            values.append(version)
            counts.append(end - at)
            at = end

    for span in sorted(spans or (), key=lambda span: span["start"]):
        try:
            version = int(span["version"])
        except ValueError:
            continue
        add(UNKNOWN_VERSION, min(span["start"], count))
        add(version, min(span["end"], count))
    add(UNKNOWN_VERSION, count)
    return Runs(tuple(values), tuple(counts))
