"""Where a run starts, which weights it refuses, and which checkpoints it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.qwen3_4b import QWEN3_4B, config_of
from vime.backends.megatron.checkpoints.commit import (
    TRACKER,
    UNFINISHED,
    begin_save,
    check_manifest,
    commit_checkpoint,
    committed,
    iteration_folder,
)
from vime.backends.megatron.checkpoints.retention import delete_old_checkpoints
from vime.backends.megatron.checkpoints.start import check_start, resolve
from vime.errors import CheckpointError


def test_a_run_starts_from_the_first_folder_that_holds_weights(tmp_path: Path) -> None:
    load, ref, model = tmp_path / "load", tmp_path / "ref", tmp_path / "hf"
    config_of(model, QWEN3_4B)
    iteration_folder(ref, None).mkdir(parents=True)
    commit_checkpoint(ref, None)

    def start(step: int | None = None, *, ref: Path | None = ref) -> tuple[str, int]:
        found = resolve(str(load), str(ref) if ref else None, str(model), step)
        return found.folder.name, found.rollout_id

    assert start() == ("release", 0)
    assert start(ref=None) == ("hf", 0)
    iteration_folder(load, 19).mkdir(parents=True)
    assert start() == ("release", 0), "without a tracker nothing was committed"
    commit_checkpoint(load, 19)
    assert start() == ("iter_0000019", 20)
    iteration_folder(load, 39).mkdir()
    commit_checkpoint(load, 39)
    assert start() == ("iter_0000039", 40)
    assert start(19) == ("iter_0000019", 20)
    with pytest.raises(CheckpointError, match="iter_0000007, which does not exist"):
        start(7)
    assert resolve(None, str(model)).is_hf
    assert (load / TRACKER).read_text() == "39"
    with pytest.raises(CheckpointError, match="holds neither"):
        resolve(None, str(tmp_path / "nothing"))


def test_a_start_without_weights_is_refused_before_anything_runs(tmp_path: Path) -> None:
    empty, model = tmp_path / "empty", tmp_path / "hf"
    empty.mkdir()

    def problems(*, plan: bool = False, **files: Any) -> list[str]:
        return check_start(
            config_of(
                model,
                QWEN3_4B,
                checkpoint=files,
                debug={"dry_run": plan},
                algorithm={"use_kl_loss": True},
            )
        )

    (no_weights,) = problems()
    assert no_weights.startswith(f"--hf-checkpoint {model}: {model} holds no *.safetensors file.")
    assert problems(plan=True) == []
    save_file({"a": torch.zeros(1)}, model / "model.safetensors")
    assert problems() == problems(load=str(empty)) == []
    (wrong,) = problems(ref_load=str(empty))
    assert wrong.startswith(f"--ref-load {empty} holds neither a checkpoint")
    iteration_folder(empty, 3).mkdir()
    commit_checkpoint(empty, 3)
    assert problems(load=str(empty)) == []
    assert "iter_0000007, which does not exist" in problems(load=str(empty), ckpt_step=7)[0]


def test_a_teacher_without_weights_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model, teacher = tmp_path / "hf", tmp_path / "teacher"
    cfg = config_of(
        model,
        QWEN3_4B,
        checkpoint={"opd_teacher_load": str(teacher)},
        algorithm={"use_opd": True},
    )
    teacher.mkdir()
    save_file({"a": torch.zeros(1)}, model / "model.safetensors")
    (neither,) = check_start(cfg)
    assert neither.startswith(f"--opd-teacher-load {teacher} holds neither a checkpoint")
    (teacher / "config.json").write_text(json.dumps(QWEN3_4B))
    (no_weights,) = check_start(cfg)
    assert no_weights.startswith(f"--opd-teacher-load {teacher}: {teacher} holds no *.safetensors")
    save_file({"a": torch.zeros(1)}, teacher / "model.safetensors")
    assert check_start(cfg) == []


OTHER_MODELS = {
    "another rotary base, which no weight's shape shows": (
        {"rope_theta": 5000000},
        "rotary_base 5000000, not 1000000",
    ),
    "fewer layers and a smaller vocabulary": (
        {"num_hidden_layers": 28, "vocab_size": 97},
        "num_layers 28, not 36; vocab_size 97, not 151936",
    ),
    "another family": ({"model_type": "llama"}, "model_type llama, not qwen3"),
    "more positions": ({"max_position_embeddings": 262144}, None),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
@pytest.mark.parametrize("flag", ["--load", "--ref-load", "--opd-teacher-load"])
def test_weights_of_another_architecture_are_refused(tmp_path: Path, case: str, flag: str) -> None:
    changes, difference = OTHER_MODELS[case]
    hf, other = tmp_path / "hf", tmp_path / "other"
    for folder, its in ((hf, QWEN3_4B), (other, QWEN3_4B | changes)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(its))
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    files = {"opd_teacher_load": str(hf)} | {flag[2:].replace("-", "_"): str(other)}
    algorithm = {"use_opd": True, "use_kl_loss": True}
    assert check_start(config_of(hf, checkpoint=files, algorithm=algorithm)) == (
        []
        if difference is None
        else [
            f"{flag} {other}: the weights are of another architecture than --hf-checkpoint {hf} "
            f"describes: {difference}. Choose weights of that architecture, or correct "
            "--hf-checkpoint."
        ]
    )


def test_old_checkpoints_go_and_the_committed_one_stays(tmp_path: Path) -> None:
    for iteration in (3, 9, 12, 100):
        iteration_folder(tmp_path, iteration).mkdir()
        (iteration_folder(tmp_path, iteration) / "file").touch()
    iteration_folder(tmp_path, None).mkdir()

    def left(keep_last: int | None, latest: int | None) -> list[str]:
        commit_checkpoint(tmp_path, latest)
        delete_old_checkpoints(tmp_path, keep_last)
        return sorted(p.name[-3:] for p in tmp_path.iterdir() if p.name != TRACKER)

    everything = ["003", "009", "012", "100", "ase"]
    assert left(None, 12) == everything
    assert left(1, None) == everything, "a release is no iteration"
    assert left(2, 12) == ["009", "012", "100", "ase"], "100 comes after the committed one"
    assert left(1, 9) == ["009", "012", "100", "ase"]
    assert left(1, 100) == ["100", "ase"]


def test_a_folder_that_only_looks_like_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for iteration in (1, 2):
        iteration_folder(tmp_path, iteration).mkdir()
    for name in ("iter_0000001.bak1", "iter_0000000_copy2", "iter_old3", "iter_1"):
        (tmp_path / name).mkdir()
    commit_checkpoint(tmp_path, 2)
    delete_old_checkpoints(tmp_path, 1)
    left = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert left == [
        "iter_0000000_copy2",
        "iter_0000001.bak1",
        "iter_0000002",
        "iter_1",
        "iter_old3",
    ]
    with pytest.raises(CheckpointError, match=r"Present: iter_0000002\.$"):
        resolve(str(tmp_path), ckpt_step=1)


def test_an_iteration_that_is_saved_again_is_out_of_force_until_it_is_complete(
    tmp_path: Path,
) -> None:
    """A crash at any point resumes one of the two saves, or the one before; never a mixture."""

    def write(iteration: int, content: str) -> None:
        (iteration_folder(tmp_path, iteration) / "weights").write_text(content)
        data = tmp_path / "rollout" / f"data_{iteration}.pt"
        data.parent.mkdir(exist_ok=True)
        data.write_text(content)

    for iteration in (9, 19):
        begin_save(tmp_path, iteration)
        write(iteration, "first")
        commit_checkpoint(tmp_path, iteration)
    assert resolve(str(tmp_path)).iteration == 19

    begin_save(tmp_path, 19)
    begin_save(tmp_path, 19)  # the loop calls it, and then every save
    assert resolve(str(tmp_path)).iteration == 9
    with pytest.raises(CheckpointError, match="iter_0000019 was not finished"):
        check_manifest(resolve(str(tmp_path), ckpt_step=19).folder, with_data=True)
    write(19, "second")
    assert resolve(str(tmp_path)).iteration == 9
    commit_checkpoint(tmp_path, 19)
    again = resolve(str(tmp_path))
    assert again.iteration == 19
    check_manifest(again.folder, with_data=True)
    assert not (again.folder / UNFINISHED).exists()


def test_the_only_iteration_saved_again_leaves_nothing_in_force_until_it_is_complete(
    tmp_path: Path,
) -> None:
    begin_save(tmp_path, 19)
    commit_checkpoint(tmp_path, 19)
    begin_save(tmp_path, 19)
    assert committed(tmp_path) is None
    commit_checkpoint(tmp_path, 19)
    assert committed(tmp_path) == "19"


def test_a_checkpoint_of_another_program_needs_no_manifest(tmp_path: Path) -> None:
    iteration_folder(tmp_path, 5).mkdir()
    (tmp_path / TRACKER).write_text("5")
    check_manifest(resolve(str(tmp_path)).folder, with_data=True)
