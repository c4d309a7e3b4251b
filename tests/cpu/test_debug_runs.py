"""--debug-rollout-only, then training on the rollouts that it saved, both as a user starts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.cpu.launching import Job
from vime.cli import parse_config
from vime.config.view import ArgsView
from vime.rollout.data_source import RolloutDataSourceWithBuffer
from vime.types import Sample


def make_job(tmp_path, assets, name: str, **flags: str | None) -> Job:
    return Job(
        folder=tmp_path / name,
        checkpoint=assets / "model",
        prompts=assets / "train.jsonl",
        flags={"--num-rollout": "2", **{f"--{k.replace('_', '-')}": v for k, v in flags.items()}},
    )


def prompts_of(job: Job, folder: Path) -> tuple[set[str], set[str]]:
    """(prompts of rollout 0, of rollout 1); saves the data source's state between to `folder`."""
    cfg = parse_config(job.command()[2:])
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, save=str(folder)))
    source = RolloutDataSourceWithBuffer(ArgsView(cfg))
    earlier = {group[0].prompt for group in source.get_samples(8)}
    source.save(0)
    return earlier, {group[0].prompt for group in source.get_samples(8)}


def test_rollouts_are_generated_without_a_trainer_and_trained_on_without_an_engine(
    tmp_path, quickstart_assets
):
    data = str(tmp_path / "debug" / "{rollout_id}.pt")
    first = make_job(
        tmp_path,
        quickstart_assets,
        "rollout-only",
        debug_rollout_only=None,
        save_debug_rollout_data=data,
        custom_rollout_log_function_path="examples.hooks.hooks.log_share_of_short",
        rollout_sample_hook_path="examples.hooks.hooks.note_length",
        load=str(tmp_path / "saved"),
        start_rollout_id="1",
        num_rollout="3",
    )
    earlier, awaited = prompts_of(first, tmp_path / "saved")
    first.run()
    steps = first.metrics()
    assert [m["step"] for m in steps] == [2, 3]
    assert all("rollout/raw_reward" in m and "train/loss" not in m for m in steps)
    assert all("rollout/share_of_short" in m for m in steps)
    assert not (first.folder / "logs/engine-1.log").exists()

    saved = torch.load(tmp_path / "debug" / "1.pt", weights_only=True)
    samples = [Sample.from_dict(s) for group in saved["groups"] for s in group]
    assert len(samples) == 64
    assert sorted({s.group_index for s in samples}) == list(range(8, 16))
    assert {s.prompt for s in samples} == awaited
    assert not awaited & earlier
    assert all(s.metadata["length"] == s.response_length for s in samples)

    second = make_job(
        tmp_path,
        quickstart_assets,
        "train-only",
        load_debug_rollout_data=data,
        start_rollout_id="1",
        num_rollout="3",
        custom_reward_post_process_path="examples.hooks.hooks.centred_on_the_batch",
    )
    second.run()
    steps = second.metrics()
    assert [m["rollout/raw_reward"] for m in steps] == [
        m["rollout/raw_reward"] for m in first.metrics()
    ]
    assert all("train/loss" in m for m in steps)
    # same weights: the trainer computes the log-probabilities that the engines sampled with
    assert steps[0]["train/train_rollout_logprob_abs_diff"] < 1e-4
    assert not (second.folder / "logs/engine-0.log").exists()
