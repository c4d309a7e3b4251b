"""The turns on shared GPUs: the order of the moves, with engines and a trainer that record them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cpu.tiny import make_config
from vime.config.sections.rollout import FULLY_ASYNC
from vime.errors import ConfigError
from vime.observe import Timers
from vime.platform import CPU, CUDA
from vime.ray.sharing import SharedGpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return tmp_path


class Engine:
    url = "http://127.0.0.1:9"

    def __init__(self, notes: list) -> None:
        self.notes = notes

    def pause(self, mode):
        self.notes.append(("pause", mode))

    def resume(self):
        self.notes.append(("resume",))

    def sleep(self, level):
        self.notes.append(("sleep", level))

    def wake_up(self, tags):
        self.notes.append(("wake", *tags))


def one_step(
    folder: Path, *, on=CUDA, rollout: dict | None = None, **cluster
) -> tuple[list, dict[str, float]]:
    """Every move in a start, an update, a training turn and another update."""
    notes: list = []
    cfg = make_config(folder, cluster=cluster, rollout=rollout or {})
    timers = Timers()
    gpus = SharedGpus(cfg, lambda *call: notes.append(call), timers, on=on)
    gpus.engines_started([Engine(notes)])
    gpus.trainer_started()
    for turn in ("update", "train", "update"):
        if turn == "train":
            gpus.sleep_engines()
        with gpus.for_training() if turn == "train" else gpus.for_weight_update():
            notes.append(turn)
    return notes, timers.take()


def test_engines_and_trainer_make_room_for_each_other(folder):
    notes, seconds = one_step(folder, colocate=True)
    update = [("wake", "weights"), "update", ("offload", False), ("wake", "kv_cache")]
    assert notes == [
        *[("sleep", 2), ("offload", True)],
        *update,
        *[("sleep", 2), ("onload",), "train", ("offload", True)],
        *update,
    ]
    assert set(seconds) == {f"perf/{n}_time" for n in ("sleep", "wake_up", "offload", "onload")}


def test_an_engine_that_starts_again_finds_room_and_an_update_follows(folder):
    notes: list = []
    cfg = make_config(folder, cluster={"colocate": True})
    gpus = SharedGpus(cfg, lambda *call: notes.append(call), Timers(), on=CUDA)
    gpus.engines_started([Engine(notes)])
    notes.clear()
    gpus.free_trainer_memory()
    notes.append("start")
    gpus.sleep_engines()
    with gpus.for_training():
        pass
    with gpus.for_weight_update():
        notes.append("update")
    ready = [("sleep", 2), ("onload",), ("offload", True)]
    update = [("wake", "weights"), "update", ("offload", False), ("wake", "kv_cache")]
    assert notes == [("offload", False), "start", *ready, *update]


@pytest.mark.parametrize(
    ("on", "cluster"),
    [
        (CPU, {"colocate": True}),
        (CUDA, {"colocate": False}),
        (
            CUDA,
            {
                "colocate": True,
                "offload_train_asked": False,
                "offload_rollout_asked": False,
            },
        ),
    ],
)
def test_nothing_moves_without_shared_gpus_or_if_the_user_forbids_it(folder, on, cluster):
    notes, seconds = one_step(folder, on=on, **cluster)
    assert notes == ["update", "train", "update"]
    assert seconds == {}


def test_one_side_can_stay_while_the_other_moves(folder):
    notes, _ = one_step(folder, colocate=True, offload_train_asked=False)
    assert not [n for n in notes if n[0] in ("offload", "onload")]
    assert ("sleep", 2) in notes
    for moment in [i for i, note in enumerate(notes) if note == ("wake", "kv_cache")]:
        assert notes[moment - 1] == ("free_cache",)  # else the engine finds no room


def test_offloading_needs_shared_gpus(folder):
    with pytest.raises(ConfigError, match="--offload-rollout has no effect without --colocate"):
        make_config(folder, cluster={"colocate": False, "offload_rollout_asked": True})
    with pytest.raises(ConfigError, match="--no-offload-train"):
        make_config(
            folder, cluster={"colocate": True, "offload": True, "offload_train_asked": False}
        )


def test_engines_that_never_sleep_stand_still_while_the_trainer_has_the_gpu(folder):
    stay = {"colocate": True, "offload_train_asked": False, "offload_rollout_asked": False}
    stream = {"function_path": FULLY_ASYNC}
    notes, _ = one_step(folder, rollout=stream, **stay)
    assert notes == ["update", ("pause", "keep"), "train", ("resume",), "update"]
    assert one_step(folder, on=CPU, rollout=stream, **stay)[0] == ["update", "train", "update"]
    assert one_step(folder, **stay)[0] == ["update", "train", "update"]
