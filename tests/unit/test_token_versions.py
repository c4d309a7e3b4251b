"""The weight version of each token, for releases of vLLM that do not report it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("msgspec", reason="vLLM brings it")

from vime.backends.vllm.plugin_route import TokenVersions


def engine(**num_tokens: int) -> SimpleNamespace:
    """An engine that has made so many tokens of each request."""
    states = {
        f"{name}-internal": SimpleNamespace(
            external_req_id=name,
            detokenizer=SimpleNamespace(num_output_tokens=lambda count=count: count),
        )
        for name, count in num_tokens.items()
    }
    return SimpleNamespace(output_processor=SimpleNamespace(request_states=states))


def span(version: int, start: int, end: int) -> dict:
    return {"version": str(version), "start": start, "end": end}


def test_an_update_in_flight_divides_an_answer():
    versions = TokenVersions()
    versions.begin(engine(), 3)
    with versions.of("a") as a:
        versions.begin(engine(a=5, of_others=9), 4)
        with versions.of("b") as b:
            versions.begin(engine(a=5, b=0), 6)
            assert a(9) == [span(3, 0, 5), span(6, 5, 9)]  # no token under version 4
            assert b(2) == [span(6, 0, 2)]
            assert b(0) is None
    assert versions.spans == {}


def test_without_an_update_nothing_is_claimed():
    with TokenVersions().of("a") as spans:
        assert spans(3) is None
