import json
from types import SimpleNamespace

import numpy as np
import pytest

from vime.rollout import wire
from vime.types import Status


def answer(count=3, reason="stop", spans=None, entry=None, **changes):
    content = [entry(i) if entry else {"token_id": i, "logprob": -0.5 * i} for i in range(count)]
    choice = {"token_ids": list(range(count)), "finish_reason": reason} | changes
    choice.setdefault("logprobs", {"content": content})
    if spans is not None:
        choice["weight_versions"] = [
            dict(zip(("version", "start", "end"), s, strict=True)) for s in spans
        ]
    return json.dumps({"choices": [choice]}).encode()


def test_answers_of_both_engine_versions_are_read():
    new = wire.parse_response(answer(spans=[("4", 0, 2), ("5", 2, 3)]))
    assert new == wire.Generation([0, 1, 2], [0.0, -0.5, -1.0], [4, 4, 5], Status.COMPLETED)
    old = wire.parse_response(
        answer(entry=lambda i: {"token": f"token_id:{i}", "logprob": -0.5 * i})
    )
    assert old == wire.Generation([0, 1, 2], [0.0, -0.5, -1.0], [-1, -1, -1], Status.COMPLETED)


def packed(
    tokens=(7, 8, 70_000), log_probs=(-0.5, -1.5, 0.0), reason="stop", spans=None, text=None
):
    head = {"finish_reason": reason, "num_tokens": len(tokens), "weight_versions": spans}
    line = json.dumps(head | ({} if text is None else {"text": text})).encode()
    arrays = np.array(tokens, np.int32), np.array(log_probs, np.float32)
    return wire.MAGIC + line + b"\n" + b"".join(a.tobytes() for a in arrays)


def test_a_packed_answer_is_read_like_any_other():
    spans = [{"version": "4", "start": 0, "end": 2}, {"version": "5", "start": 2, "end": 3}]
    assert wire.parse_response(packed(spans=spans)) == wire.Generation(
        [7, 8, 70_000], [-0.5, -1.5, 0.0], [4, 4, 5], Status.COMPLETED
    )
    assert wire.parse_response(packed()).weight_versions == [-1, -1, -1]
    assert wire.parse_response(packed((), (), "abort")) == wire.Generation()


def test_client_and_engine_name_the_same_route():
    route = pytest.importorskip("vime.backends.vllm.plugin_route", reason="needs msgspec")
    for name in ("PATH", "PACKED", "TEXT", "ALL", "PLAIN", "MAGIC"):
        assert getattr(route, name) == getattr(wire, name)


def test_the_client_reads_the_answers_that_the_route_packs():
    route = pytest.importorskip("vime.backends.vllm.plugin_route", reason="needs msgspec")
    output = SimpleNamespace(
        finish_reason="length",
        token_ids=[5, 70_000, 6],
        logprobs=SimpleNamespace(logprobs=[-0.5, -1.0, -0.25], start_indices=[0, 1, 2]),
        weight_versions=[SimpleNamespace(version="2", start=0, end=3)],
    )
    read = wire.parse_response(route.pack(output, "two\nlines \u2028 é"))
    numbers = [5, 70_000, 6], [-0.5, -1.0, -0.25], [2, 2, 2]
    assert read == wire.Generation(*numbers, Status.TRUNCATED, "two\nlines \u2028 é")
    assert wire.parse_response(route.pack(output)).text is None
    assert wire.parse_response(route.pack(output, url="http://h:1")).engine == "http://h:1"


def test_a_missing_weight_version_is_marked_unknown():
    assert wire.parse_response(answer()).weight_versions == [-1, -1, -1]
    assert wire.parse_response(answer(spans=[("default", 0, 3)])).weight_versions == [-1, -1, -1]


@pytest.mark.parametrize(
    ("reason", "status"),
    [("stop", Status.COMPLETED), ("length", Status.TRUNCATED), ("abort", Status.ABORTED)],
)
def test_the_finish_reason_becomes_the_status(reason, status):
    assert wire.parse_response(answer(reason=reason)).status is status


def test_an_abort_before_the_first_token_is_an_empty_answer():
    body = answer(0, "abort", token_ids=None, logprobs=None)
    assert wire.parse_response(body) == wire.Generation()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (answer(logprobs=None), "3 tokens came with 0 log-probabilities"),
        (answer(logprobs={"content": [{"logprob": -1.0}]}), "3 tokens came with 1 log"),
        (answer(entry=lambda i: {"logprob": None}), "no finite log-probability"),
        (answer(entry=lambda i: {"logprob": -9999.0}), "no finite log-probability"),
        (answer(reason="error"), "finish_reason 'error'"),
        (packed(log_probs=(-1.0,)), "3 tokens came with 1 log"),
        (packed(log_probs=(-1.0, float("nan"), -1.0)), "no finite log-probability"),
        (packed(log_probs=(-1.0, -float("inf"), -1.0)), "no finite log-probability"),
        (packed()[:-3], "not an answer"),
        (packed(tokens=())[:9], "not an answer"),
        (b'{"token_ids": "AAA"}', "not an answer"),
        (b'{"choices": []}', "not an answer"),
        (b"<html>", "not an answer"),
    ],
)
def test_an_incomplete_answer_is_an_error(body, words):
    with pytest.raises(wire.WireError, match=words):
        wire.parse_response(body)


def test_the_engine_makes_text_only_for_stop_strings():
    params = {"temperature": 1.0, "max_tokens": 4, "stop": None, "seed": 3}
    body = json.loads(wire.build_request([1, 2], params))
    assert body["token_ids"] == [1, 2]
    assert body["sampling_params"] == {
        "temperature": 1.0,
        "max_tokens": 4,
        "seed": 3,
        "logprobs": 0,
        "detokenize": False,
        "n": 1,
    }
    body = json.loads(wire.build_request([1], params | {"stop": ["x"]}))
    assert body["sampling_params"]["detokenize"] is True
