"""`--dry-run` explains a configuration and starts nothing. A reader can recompute its figures."""

from pathlib import Path

import pytest

from tests.unit.command_lines import Flags, refused, words
from vime.cli import parse_config


def plan(capsys: pytest.CaptureFixture, folder: Path, changes: Flags) -> str:
    """The text that `--dry-run` prints before it exits with code 0."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(words(folder, changes | {"--dry-run": None}))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_it_prints_the_plan_and_exits_with_0(capsys, tmp_path):
    changes = {
        "--colocate": None,
        "--num-steps-per-rollout": "2",
        "--tensor-model-parallel-size": "2",
        "--use-dynamic-batch-size": None,
        "--max-tokens-per-gpu": "9216",
        "--eps-clip": "0.3",
        "--vllm-enforce-eager": None,
        "--num-layers": "3",
    }
    text = plan(capsys, tmp_path, changes)
    for line in (
        "--eps-clip-high 0.3",
        "--colocate on",
        "--vllm-enforce-eager on",
        "--num-layers 3",
        "32 prompts x 8 samples = 256 samples a rollout",
        "256 samples / 2 optimizer steps = 128 samples a step",
        "128 samples / 4 data-parallel ranks = 32 a rank and step",
        "a pack of up to 9,216 tokens",
        "3 rollouts x 2 steps = 6 optimizer steps over 768 samples",
        "trainer: 8 GPUs = TP 2 x PP 1 x CP 1 x DP 4",
        "engines: 8 of 1 GPUs each, the trainer's, in turn",
        "KV cache",
    ):
        assert line in text


def test_keys_are_not_shown(capsys, tmp_path):
    variables = '{"WANDB_API_KEY":"s3cret","NCCL_DEBUG":"INFO"}'
    text = plan(capsys, tmp_path, {"--vllm-api-key": "s3cret", "--train-env-vars": variables})
    assert "--vllm-api-key (hidden)" in text
    assert "{'WANDB_API_KEY': '(hidden)', 'NCCL_DEBUG': 'INFO'}" in text
    assert "s3cret" not in text


def test_a_wrong_configuration_is_refused_and_not_shown(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        parse_config(words(tmp_path, {"--dry-run": None, "--num-steps-per-rollout": "3"}))
    assert stopped.value.code == 2
    assert capsys.readouterr().out == ""


def test_an_unknown_architecture_is_shown_without_memory_figures(capsys, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"d_model": 64}')
    text = plan(capsys, tmp_path, {"--hf-checkpoint": str(folder)})
    assert f"unknown: {folder}/config.json describes no architecture that vime trains" in text


def test_a_plan_can_be_for_gpus_that_this_machine_lacks(capsys, tmp_path):
    changes = {
        "--plan-gpu-memory": "80",
        "--colocate": None,
        "--vllm-gpu-memory-utilization": "0.5",
    }
    text = plan(capsys, tmp_path, changes)
    for line in (
        "together: 8 GPUs (cuda)",
        "parameters, bfloat16",
        "a GPU of 80.0 GiB, less --train-memory-margin-bytes (1.0 GiB), leaves ",
        "--vllm-gpu-memory-utilization 0.5 takes 40.0 GiB of 80.0",
        "the trainer's weights and optimizer wait in host memory",
    ):
        assert line in text


def test_a_plan_that_does_not_fit_says_by_how_much(capsys, tmp_path):
    assert "(1.0 GiB), lacks 1." in plan(capsys, tmp_path, {"--plan-gpu-memory": "0.01"})


def test_a_flag_of_plans_is_refused_for_a_run(capsys, tmp_path):
    (problem,) = refused(capsys, tmp_path, {"--plan-gpu-memory": "80"})
    assert problem.startswith("--plan-gpu-memory 80.0 has no effect without --dry-run.")


def test_a_trainer_that_stays_on_the_gpus_is_shown(capsys, tmp_path):
    changes = {"--colocate": None, "--no-offload-train": None}
    assert "While engines generate, the trainer keeps " in plan(capsys, tmp_path, changes)
