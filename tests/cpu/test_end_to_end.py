"""The whole job with all its real parts, started as a user starts it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.cpu.launching import Job, alive, descendants
from vime.config.sections.rollout import FULLY_ASYNC

RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # a SIGKILL ends them in a minute
EXACT = 1e-4  # in float32, trainer and engine compute the same distribution


@pytest.fixture(scope="module")
def job_in(tmp_path_factory, quickstart_assets):
    """Makes a Job with the untrained quickstart model in a new folder."""
    jobs: list[Job] = []

    def make(name: str, entry: str = "train.py", env: dict | None = None, **flags) -> Job:
        folder = tmp_path_factory.mktemp(name)
        given = {f"--{k.replace('_', '-')}": v for k, v in flags.items()}
        job = Job(
            folder=folder,
            checkpoint=quickstart_assets / "model",
            prompts=quickstart_assets / "train.jsonl",
            entry=entry,
            flags=given,
            env={"PROMPT_LOG": str(folder / "prompts.tsv"), **(env or {})},
        )
        jobs.append(job)
        return job

    yield make
    for job in jobs:
        job.end()


@pytest.fixture(scope="module")
def straight_run(job_in):
    """Six rollouts without a break, with checkpoints."""
    job = job_in("straight")
    job.flags |= {"--save": str(job.folder / "ckpt"), "--save-interval": "2"}
    job.run()
    return job


def trained_prompts(job: Job) -> dict[str, list[str]]:
    """{rollout id: its prompts' labels, in the order of their index}."""
    rows = [line.split("\t") for line in (job.folder / "prompts.tsv").read_text().splitlines()]
    rollouts: dict[str, dict[int, str]] = {}
    for rollout_id, index, label in rows:
        rollouts.setdefault(rollout_id, {})[int(index)] = label
    return {r: [labels[i] for i in sorted(labels)] for r, labels in rollouts.items()}


def test_reward_rises_and_the_engine_never_drifts_from_the_trainer(straight_run):
    steps = [m for m in straight_run.metrics() if "train/loss" in m]
    assert len(steps) == 6
    rewards = [m["rollout/raw_reward"] for m in steps]
    assert rewards[-1] > rewards[0] + 0.05, rewards
    drifts = [m["train/train_rollout_logprob_abs_diff"] for m in steps]
    assert max(drifts) < EXACT, drifts
    assert abs(steps[0]["train/ppo_kl"]) < 1e-6
    assert abs(steps[0]["train/kl_loss"]) < 1e-6
    assert steps[-1]["train/kl_loss"] > 1e-6  # the reference did not move


def test_every_step_is_logged_once_with_its_number(straight_run):
    steps = [m["step"] for m in straight_run.metrics()]
    assert steps == sorted(set(steps))


def test_a_killed_run_leaves_nothing_behind_and_continues_with_the_same_prompts(
    job_in, straight_run
):
    job = job_in("killed")
    save = str(job.folder / "ckpt")
    job.flags |= {"--save": save, "--load": save, "--save-interval": "2"}
    process = job.start()
    below = wait_for_checkpoint(process, Path(save), iteration=1)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    wait_until_gone(below, but=RAY_AGENTS)

    job.run()
    wait_until_gone(below)
    assert trained_prompts(job) == trained_prompts(straight_run)
    steps = [m["step"] for m in job.metrics()]
    assert steps == [m["step"] for m in straight_run.metrics()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "scheduler"])
def test_a_signal_to_the_whole_group_ends_every_process_of_the_run(number, job_in):
    """A terminal's Ctrl-C and a scheduler's stop also reach Ray and the actors."""
    job = job_in("interrupted", num_rollout="500")
    process = job.start()
    wait_for_text(process, job.folder / "metrics.jsonl", '"step": 1')
    below = descendants(process.pid)
    assert len(below) > 3  # Ray, a trainer, a server, a router
    os.killpg(process.pid, number)
    assert process.wait(90) == 130
    wait_until_gone(below)
    assert job.log.read_text().splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in job.log.read_text()


def test_the_async_loop_trains_decoupled_and_over_gloo(job_in):
    """The weights that generated each rollout are kept, so the old policy is exact."""
    job = job_in(
        "async",
        entry="train_async.py",
        colocate="",
        rollout_num_gpus="1",
        num_rollout="6",
        keep_old_actor=None,
        update_weights_interval="2",
    )
    job.run()
    steps = [m for m in job.metrics() if "train/loss" in m]
    assert [m["rollout/weight_version/max"] for m in steps] == [0, 0, 0, 2, 2, 4]
    assert max(m["train/train_rollout_logprob_abs_diff"] for m in steps) < EXACT
    assert max(abs(m["train/ppo_kl"]) for m in steps) > 1e-6
    assert steps[-1]["rollout/raw_reward"] > steps[0]["rollout/raw_reward"]


def test_generation_that_never_stops_loses_and_repeats_nothing_when_it_is_killed(
    job_in, quickstart_assets
):
    """Every sample up to the last one is trained once, within the cap on its age."""
    job = job_in(
        "stream",
        entry="train_async.py",
        colocate="",
        rollout_num_gpus="1",
        num_rollout="6",
        rollout_function_path=FULLY_ASYNC,
        max_staleness="2",
        eval_interval="3",
        eval_prompt_data=f"few {quickstart_assets}/eval.jsonl@[:4]",
    )
    save, rollouts = job.folder / "ckpt", job.folder / "rollouts"
    job.flags |= {"--save": str(save), "--load": str(save), "--save-interval": "2"}
    job.flags["--save-debug-rollout-data"] = str(rollouts / "{rollout_id}.pt")
    process = job.start()
    below = wait_for_checkpoint(process, save, iteration=1)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    wait_until_gone(below, but=RAY_AGENTS)

    job.run()
    steps = [m for m in job.metrics() if "train/loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 6]
    assert max(m["rollout/staleness/max"] for m in steps) <= 2
    assert max(m["rollout/staleness/mean"] for m in steps) > 0
    assert [m["step"] for m in job.metrics() if "eval/few" in m] == [0, 3, 6]
    trained = []
    for step in range(6):
        saved = torch.load(rollouts / f"{step}.pt", weights_only=True)
        samples = [sample for group in saved["groups"] for sample in group]
        trained += [sample["index"] for sample in samples]
        versions = {v for sample in samples for v in sample["weight_versions"]}
        assert versions <= set(range(max(0, step - 2), step + 1))
    assert sorted(trained) == list(range(6 * 64))


def test_a_lost_engine_comes_back_and_nothing_of_the_run_is_lost(job_in, straight_run):
    """The engine is lost once while it generates and once before it gets new weights, over gloo.

    The weights that generated each rollout are kept, so no rollout's old policy may drift.
    """
    job = job_in(
        "lost",
        env={"LOSE_IN": "1", "LOSE_AFTER": "3"},
        entry="train_async.py",
        colocate="",
        rollout_num_gpus="1",
        keep_old_actor=None,
        use_fault_tolerance=None,
        custom_generate_function_path="tests.cpu.losing_engines.generate",
        rollout_all_samples_process_path="tests.cpu.losing_engines.after_rollout",
    )
    job.run(timeout_s=420)
    steps = [m for m in job.metrics() if "train/loss" in m]
    name = "rollout/engines_restarted"
    assert {m["step"]: m[name] for m in steps if name in m} == {1: 1, 3: 1}
    # rollout 1 was generated anew with the weights after rollout 0
    assert [m["rollout/weight_version/max"] for m in steps] == [0, 1, 1, 2, 3, 4]
    assert max(m["train/train_rollout_logprob_abs_diff"] for m in steps) < EXACT
    assert trained_prompts(job) == trained_prompts(straight_run)


@pytest.fixture(scope="module")
def untied_model(quickstart_assets, tmp_path_factory) -> Path:
    """The quickstart's model with an untied output layer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("untied-quickstart")
    tied = AutoModelForCausalLM.from_pretrained(quickstart_assets / "model")
    tied.config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(tied.config)
    untied.model.load_state_dict(tied.model.state_dict())
    untied.save_pretrained(folder)
    AutoTokenizer.from_pretrained(quickstart_assets / "model").save_pretrained(folder)
    return folder


def test_two_data_parallel_ranks_keep_two_engines_exact_with_an_untied_head(
    job_in, straight_run, untied_model
):
    """With PPO: the critic has a value head in place of the output layer."""
    job = job_in(
        "dp2",
        actor_num_gpus_per_node="2",
        cpu_slots="2",
        num_rollout="3",
        advantage_estimator="ppo",
    )
    job.checkpoint = untied_model
    job.run()
    check_two_ranks(job, straight_run)
    norms = [m["train/critic_grad_norm"] for m in job.metrics() if "train/loss" in m]
    assert len(norms) == 3
    assert min(norms) > 0


def test_two_tensor_parallel_ranks_keep_the_engine_exact(job_in, straight_run):
    job = job_in(
        "tp2",
        actor_num_gpus_per_node="2",
        cpu_slots="2",
        rollout_num_gpus_per_engine="2",
        tensor_model_parallel_size="2",
        sequence_parallel=None,
        num_rollout="2",
    )
    job.run()
    check_two_ranks(job, straight_run)


def check_two_ranks(job: Job, straight_run: Job) -> None:
    steps = [m for m in job.metrics() if "train/loss" in m]
    assert max(m["train/train_rollout_logprob_abs_diff"] for m in steps) < EXACT
    assert steps[-1]["train/grad_norm"] > 0
    assert trained_prompts(job)["0"] == trained_prompts(straight_run)["0"]


def wait_for_text(process, file: Path, text: str, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not (file.exists() and text in file.read_text()):
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, f"no {text} in {file} after {timeout_s} s"
        time.sleep(0.1)


def wait_for_checkpoint(process, folder: Path, iteration: int) -> list[int]:
    """Waits until the tracker names the iteration. Returns the run's processes."""
    wait_for_text(process, folder / "latest_checkpointed_iteration.txt", str(iteration))
    return descendants(process.pid)


def wait_until_gone(pids: list[int], but: tuple[str, ...] = (), timeout_s: float = 120) -> None:
    """Waits until none of the processes runs, except processes with a command line in `but`."""
    deadline = time.monotonic() + timeout_s
    while left := [line for line in alive(pids) if not any(name in line for name in but)]:
        assert time.monotonic() < deadline, "\n".join(left)
        time.sleep(0.2)
