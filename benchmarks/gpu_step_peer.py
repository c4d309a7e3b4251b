"""gpu_step.py beside TRL: starts peer_trl.py and writes the ratio of the step times."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.records import quartiles, save_gpu_figure

ROOT = Path(__file__).resolve().parents[1]


def start(
    args: argparse.Namespace, model: Path, prompts: Path, gpu: str
) -> subprocess.Popen[bytes]:
    """TRL's run on one GPU; its output goes to `log_of(args)`."""
    words = [sys.executable, str(ROOT / "benchmarks/peer_trl.py"), "--model", str(model)]
    words += ["--prompts", str(prompts), "--response", str(args.response)]
    words += ["--steps", str(args.peer_steps), *(["--long-tail"] if args.long_tail else [])]
    with log_of(args).open("wb") as out:
        return subprocess.Popen(
            words, stdout=out, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu}, cwd=ROOT
        )


def log_of(args: argparse.Namespace) -> Path:
    return args.work_dir / "trl.log"


def compare(args: argparse.Namespace, peer: subprocess.Popen[bytes], step: dict[str, Any]) -> None:
    """Waits for TRL and writes the ratio after each of its steps, so an interrupted run keeps one.

    Raises SystemExit when TRL fails.
    """
    num_seen = 0
    while True:
        ended = peer.poll() is not None
        lines = [n for n in log_of(args).read_text().split("\n")[:-1] if n.startswith('{"name"')]
        for line in lines[num_seen:]:  # the other lines are its progress bar
            write_ratio(args, json.loads(line), step)
        num_seen = len(lines)
        if ended:
            break
        time.sleep(1)
    if peer.returncode:
        raise SystemExit(f"TRL failed with {peer.returncode}: see {log_of(args)}")


def write_ratio(args: argparse.Namespace, found: dict[str, Any], step: dict[str, Any]) -> None:
    seconds = quartiles(found["steps"])
    print(
        f"  {found['name']}: step {seconds['value']:.2f} s {seconds['spread']}, {found}", flush=True
    )
    low, high = step["spread"]
    figure = {
        "value": round(seconds["value"] / step["value"], 3),
        "spread": [round(seconds["value"] / high, 3), round(seconds["value"] / low, 3)],
    }
    name = "grpo_step_vs_trl_long_tail" if args.long_tail else "grpo_step_vs_trl"
    peer = {"name": found["name"], **seconds}
    save_gpu_figure(name, figure, "times as fast", peer, folder=args.output)
