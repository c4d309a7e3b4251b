"""A background save that fails in any way is a failure when the next one begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vime.backends.megatron.checkpoints import agreement, async_save
from vime.errors import CheckpointError


@pytest.fixture
def saves(monkeypatch):
    """Background saves of one rank. `ranks.gather` replaces the collective operation."""
    ranks = SimpleNamespace(
        gather=lambda into, mine, group: into.__setitem__(slice(None), [mine]),
    )
    dist = SimpleNamespace(
        new_group=lambda **_: "group",
        get_rank=lambda *_: 0,
        get_world_size=lambda *_: 1,
        all_gather_object=lambda into, mine, group: ranks.gather(into, mine, group),
    )
    monkeypatch.setattr(async_save, "dist", dist)
    monkeypatch.setattr(agreement, "dist", dist)
    return async_save.BackgroundSaves(), ranks


def nothing(*_):
    pass


def failing(error):
    def work(*_):
        raise error

    return work


def test_a_save_that_succeeds_is_over_without_an_error(saves):
    background, _ = saves
    done = []
    background.begin(nothing, lambda: done.append("commit"), "refused")
    background.finish()
    assert done == ["commit"]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("part", ["write", "commit"])
def test_a_save_whose_work_fails_is_reported_by_the_next(saves, part, error):
    background, _ = saves
    work = {"write": nothing, "commit": nothing, part: failing(error)}
    background.begin(work["write"], work["commit"], "cannot write")
    with pytest.raises(CheckpointError):
        background.finish()
    background.finish()  # told once


@pytest.mark.parametrize("error", [RuntimeError("connection closed by peer"), SystemExit(1)])
def test_a_save_whose_agreement_fails_is_reported_by_the_next(saves, error):
    background, ranks = saves
    ranks.gather = failing(error)
    background.begin(nothing, nothing, "cannot write")
    with pytest.raises(CheckpointError):
        background.finish()
