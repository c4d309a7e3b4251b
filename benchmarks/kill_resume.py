"""Kills a run at random moments and resumes it: is anything lost, repeated or different?

    make bench-kill-resume                       20 kills of train.py, 10 of train_async.py, 30 of
                                                 generation that never stops
    python -m benchmarks.kill_resume --kills 3 --loop sync

For each loop, one run is undisturbed, and one is killed (kill -9) and resumed until it is done. The
moments include the writing of checkpoints. Both runs use real Ray, vLLM and Megatron, float32, and
a seed for each sample. Every second kill ends all processes of the run at once, like a power cut.
The others end the driver, and the other processes must notice its death. With --folder an
interrupted call can be continued. Afterwards the two runs are compared: the samples of every
rollout (prompts, responses, order), how often each sample was trained, the metrics of every step,
the exported weights. In the fully asynchronous loop the time of each request decides which step
trains on a group, so there only the counts must be equal: no sample is lost or trained twice, and
every step is logged once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.kill_resume_report import (
    compare,
    write_figure,
    write_page,
    write_result,
    write_table,
)
from tests.cpu.launching import Job, alive, descendants
from vime.config.sections.rollout import FULLY_ASYNC

LOOPS = {"sync": "train.py", "async": "train_async.py", "fully-async": "train_async.py"}
KILLS = {"sync": 20, "async": 10, "fully-async": 30}
ROLLOUTS_PER_KILL = 4  # more than finish between two kills, so the run outlives its kills
SAVE_EVERY = 2
START_S = 400.0  # the longest wait for a run's first sign of life, on a busy machine
STARTS = 3  # on a busy machine Ray may fail to start; that does not count as a kill
SIGNS = ("anywhere", "training", "saving")  # the moments of the kills


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill, and the state that it left on disk."""

    drawn_from: str
    whole_run: bool
    after_s: float  # since the start of the process
    step: int | None  # the last one logged
    committed: int | None  # the iteration in the tracker
    unfinished: list[str]  # the parts of the next checkpoint that exist


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loop", choices=[*LOOPS, "all"], default="all")
    parser.add_argument("--kills", type=int, help=f"kills of each loop (default: {KILLS})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--flags", nargs="*", default=[], help="more switches, such as async-save")
    parser.add_argument("--write", action="store_true", help="update docs/models.md, results")
    parser.add_argument("--folder", type=Path, help="keep everything here")
    given = parser.parse_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="vime-kills-"))
    good = True
    for loop in LOOPS if given.loop == "all" else [given.loop]:
        num_kills = given.kills or KILLS[loop]
        kills, verdict = examine(loop, num_kills, root / loop, given.seed, given.flags)
        write_table(loop, kills, verdict, sys.stdout)
        good = good and verdict.is_good
        if given.write:
            write_result(loop, kills, verdict)
            write_figure()
            write_page()
    if not given.folder:
        shutil.rmtree(root)
    return int(not good)


def examine(loop: str, num_kills: int, root: Path, seed: int, flags: list[str]):
    """Runs one loop undisturbed and killed: (kills, verdict)."""
    make_assets(root)
    num_rollouts = ROLLOUTS_PER_KILL * num_kills
    straight = make_job(root, "straight", loop, num_rollouts, flags)
    if not is_done(straight, num_rollouts):
        say(loop, f"undisturbed run of {num_rollouts} rollouts")
        straight.run(timeout_s=120 + 10 * num_rollouts)
    killed = make_job(root, "killed", loop, num_rollouts, flags)
    notes = root / "kills.json"
    kills = [Kill(**k) for k in json.loads(notes.read_text())] if notes.exists() else []
    ended: list[int] = []
    try:
        for number in range(len(kills), num_kills):
            rng = random.Random(f"{seed} {number}")
            kill, pids = start_and_kill(killed, number, rng)
            kills.append(kill)
            notes.write_text(json.dumps([asdict(k) for k in kills]))
            ended += pids
            say(loop, f"kill {number + 1} of {num_kills}: {json.dumps(asdict(kill))}")
        killed.run(timeout_s=120 + 10 * num_rollouts)
    finally:
        killed.end()
    wait_until_gone(ended, timeout_s=120)  # Ray's own agents need a minute
    return kills, compare(straight, killed, exact=loop != "fully-async")


def is_done(job: Job, num_rollouts: int) -> bool:
    try:
        return job.metrics()[-1]["step"] == num_rollouts
    except (OSError, IndexError, ValueError):
        return False


def say(loop: str, line: str) -> None:
    print(f"[{loop}] {line}", flush=True)


def make_assets(root: Path) -> None:
    from scripts.quickstart.data import write_data
    from scripts.quickstart.model import write_checkpoint

    root.mkdir(parents=True, exist_ok=True)
    write_data(root, seed=0)
    write_checkpoint(root / "model", seed=0)


def make_job(root: Path, name: str, loop: str, num_rollouts: int, flags: list[str]) -> Job:
    folder = root / name
    save = str(folder / "ckpt")
    chosen: dict[str, str | None] = {
        "--num-rollout": str(num_rollouts),
        "--rollout-batch-size": "4",
        "--lr": "3e-4",
        "--save": save,
        "--load": save,
        "--save-interval": str(SAVE_EVERY),
        "--save-hf": str(folder / "hf" / "{rollout_id}"),
        "--save-debug-rollout-data": str(folder / "rollouts" / "{rollout_id}.pt"),
        "--vllm-enable-deterministic-inference": None,
    }
    if loop != "sync":
        chosen |= {"--colocate": "", "--rollout-num-gpus": "1", "--use-rollout-logprobs": None}
    if loop == "fully-async":
        chosen["--rollout-function-path"] = FULLY_ASYNC
    chosen |= {f"--{flag}": None for flag in flags}
    env = {"OMP_NUM_THREADS": "1", "PROMPT_LOG": str(folder / "prompts.tsv")}
    return Job(folder, root / "model", root / "train.jsonl", LOOPS[loop], chosen, env)


def start_and_kill(job: Job, number: int, rng: random.Random) -> tuple[Kill, list[int]]:
    """Starts the run and kills it: (the kill, the ids of the run's processes)."""
    drawn_from, whole_run = SIGNS[number % len(SIGNS)], number % 2 == 0
    for attempt in range(STARTS):
        process, started = job.start(), time.monotonic()
        if drawn_from == "anywhere":
            time.sleep(rng.uniform(0, 40))
            break
        wait_for_a_step(job, process)
        if process.poll() is None:
            break
        say(job.entry, f"start {attempt + 1} failed; see {job.log}")
    if drawn_from != "anywhere" and process.poll() is None:
        if drawn_from == "training":
            time.sleep(rng.uniform(0, 3))
        else:
            present = checkpoint_files(job)
            wait_for(lambda: process.poll() is not None or checkpoint_files(job) - present)
            time.sleep(rng.uniform(0, 0.3))
    if process.poll() is not None:
        sys.exit(f"the run ended before kill {number + 1}; see {job.log}")
    pids = descendants(process.pid)
    os.killpg(process.pid, signal.SIGKILL)  # its own process group: see Job.start
    if whole_run:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    process.wait(30)
    after_s = time.monotonic() - started
    wait_until_gone(pids, timeout_s=60, besides="agent")
    return Kill(drawn_from, whole_run, round(after_s, 2), *state_of(job)), pids


def wait_for_a_step(job: Job, process: subprocess.Popen) -> None:
    """Returns when the run logs its first step, or ends."""
    log = job.folder / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0

    def happened() -> bool:
        stepped = log.exists() and log.stat().st_mtime_ns > before
        return stepped or process.poll() is not None

    wait_for(happened)


def checkpoint_files(job: Job) -> set[str]:
    """The files of the checkpoints and exports so far."""
    folders = (job.folder / "hf", job.folder / "ckpt")
    return {str(p) for folder in folders for p in folder.rglob("*")}


def state_of(job: Job) -> tuple[int | None, int | None, list[str]]:
    """(last step logged, iteration committed, existing parts of a later checkpoint)"""
    try:
        lines = (job.folder / "metrics.jsonl").read_text().splitlines()
        step = json.loads(lines[-1])["step"]
    except (OSError, IndexError, json.JSONDecodeError):
        step = None
    tracker = job.folder / "ckpt" / "latest_checkpointed_iteration.txt"
    committed = int(tracker.read_text()) if tracker.exists() else None
    later = range((-1 if committed is None else committed) + 1, 10_000)
    names = {
        "export": [int(p.name) for p in (job.folder / "hf").glob("*")],
        "data state": [
            int(p.stem.rsplit("_", 1)[1])
            for p in (job.folder / "ckpt" / "rollout").glob("global_dataset_state_dict_*.pt")
        ],
        "weights": [int(p.name[5:]) for p in (job.folder / "ckpt").glob("iter_*")],
    }
    return step, committed, [name for name, ids in names.items() if any(i in later for i in ids)]


def wait_for(happened: Callable[[], Any], timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            sys.exit(f"no sign of life of the run in {timeout_s:.0f} s")
        time.sleep(0.002)


def wait_until_gone(pids: list[int], timeout_s: float, besides: str = "\0") -> None:
    """Fails if processes of a killed run stay, except those with `besides` in their command."""
    deadline = time.monotonic() + timeout_s
    while left := [line for line in alive(pids) if besides not in line]:
        if time.monotonic() > deadline:
            sys.exit("still alive after the kill:\n" + "\n".join(left))
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
