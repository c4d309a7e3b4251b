"""Runs `train.py` as a user does: in a process of its own, with flags, in a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Job:
    """One run of an entry point. Flags map to values: None makes a switch, "" removes the flag.

    prefix  words before the command, such as those that run it on a node of a cluster
    """

    folder: Path
    checkpoint: Path
    prompts: Path
    entry: str = "train.py"
    flags: dict[str, str | None] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    prefix: list[str] = field(default_factory=list)
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "out.log"

    def command(self) -> list[str]:
        defaults: dict[str, str | None] = {
            "--hf-checkpoint": str(self.checkpoint),
            "--prompt-data": str(self.prompts),
            "--input-key": "prompt",
            "--label-key": "label",
            "--apply-chat-template": None,
            "--rollout-shuffle": None,
            "--custom-rm-path": "tests.cpu.rewards_for_tests.share_of_sevens",
            "--rollout-batch-size": "8",
            "--n-samples-per-prompt": "8",
            "--rollout-max-response-len": "16",
            "--num-rollout": "6",
            "--actor-num-gpus-per-node": "1",
            "--colocate": None,
            "--use-dynamic-batch-size": None,
            "--max-tokens-per-gpu": "4096",
            "--lr": "3e-3",
            "--use-kl-loss": None,
            "--kl-loss-type": "low_var_kl",
            "--run-dir": str(self.folder),
        }
        chosen = {k: v for k, v in {**defaults, **self.flags}.items() if v != ""}
        words = [w for k, v in chosen.items() for w in ((k,) if v is None else (k, *v.split()))]
        return [*self.prefix, sys.executable, str(ROOT / self.entry), *words]

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT), **self.env}
        with self.log.open("a") as out:
            process = subprocess.Popen(
                self.command(),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
                # a shell starts its background jobs with SIGINT ignored, and children inherit that
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.started.append(process)
        return process

    def run(self, timeout_s: float = 300) -> None:
        """Runs to the end. Fails with the end of the log if the exit code is not 0."""
        process = self.start()
        try:
            code = process.wait(timeout_s)
        finally:
            self.end()
        assert code == 0, self.log.read_text()[-6000:]

    def end(self) -> None:
        """Ends the processes that a failed test left running."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)

    def metrics(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, found through /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        child, parent = int(text.split(" ", 1)[0]), int(text.rsplit(")", 1)[1].split()[1])
        children.setdefault(parent, []).append(child)
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def alive(pids: Iterable[int]) -> list[str]:
    """The command lines of the processes that still run. Zombies do not count."""
    lines = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if state != "Z":
            lines.append(f"{pid} {command[:120]}")
    return lines
