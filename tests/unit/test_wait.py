"""A wait for Ray that expires names the processes that are late."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.stack


@pytest.fixture
def some_never_end(monkeypatch):
    """Stands for Ray: refs are numbers, and the even ones have a value at once."""
    from vime.ray import wait

    def look(pending, num_returns, timeout):
        done = [ref for ref in pending if ref % 2 == 0][:num_returns]
        return done, [ref for ref in pending if ref not in done]

    monkeypatch.setattr(wait, "ray", SimpleNamespace(wait=look, get=lambda refs: refs))
    return wait


def test_a_wait_that_expires_names_the_ranks_that_are_late_and_their_nodes(some_never_end):
    names = [f"rank {rank} on 10.0.0.{1 + rank // 2}" for rank in range(4)]
    with pytest.raises(TimeoutError) as late:
        some_never_end.wait_all(range(4), what="4 ranks to start", timeout_s=0.1, names=names)
    said = "4 ranks to start: 2 of 4 did not finish (rank 1 on 10.0.0.1, rank 3 on 10.0.0.2)."
    assert said in str(late.value)


def test_of_many_late_ranks_the_first_are_named(some_never_end):
    names = [f"rank {rank}" for rank in range(256)]
    with pytest.raises(TimeoutError) as late:
        some_never_end.wait_all(range(256), what="ranks", timeout_s=0.1, names=names)
    assert "128 of 256 did not finish (rank 1, rank 3, " in str(late.value)
    assert "rank 15, ...)" in str(late.value)


def test_a_wait_returns_the_values_in_order(some_never_end):
    assert some_never_end.wait_all([4, 2], what="values", timeout_s=1) == [4, 2]
