"""`make quickstart`: makes a tiny model and improves it with GRPO, on a machine without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this file is run as a script

from rich.console import Console  # noqa: E402

from scripts.quickstart.recipe import NUM_ROLLOUT, Recipe, StageFailed, Terminated  # noqa: E402
from scripts.quickstart.report import report  # noqa: E402
from scripts.quickstart.stages import Done, run_stages  # noqa: E402
from scripts.quickstart.task import SHARE_RIGHT  # noqa: E402

INTRODUCTION = f"""\
[bold]vime quickstart[/bold]: a tiny Qwen3 learns three-digit addition on this machine, in minutes.
First it imitates a careless pupil, whose work is wrong {1 - SHARE_RIGHT:.0%} of the time on \
purpose, so imitation
is right about {SHARE_RIGHT:.0%} of the time at best. GRPO then sees no demonstrations, only \
whether each answer
is right. Everything above {SHARE_RIGHT:.0%} comes from the verifier.
"""


def terminated(signum: int, frame: object) -> None:
    raise Terminated


def main() -> int:
    signal.signal(signal.SIGTERM, terminated)
    args = parse()
    console = Console(highlight=False, soft_wrap=True)
    recipe = Recipe(shown(args.run_dir), args.seed, args.num_rollout)
    console.print(INTRODUCTION)
    installed_s = time.time() - args.started
    try:
        done = run_stages(
            recipe.stages(),
            recipe.run_dir / "stages",
            lambda words: console.print(f"[bold]{words}[/bold]", markup=True),
        )
    except StageFailed as error:
        console.print(str(error), markup=False, style="red")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; `make quickstart` continues with this stage")
        return 130
    total_s = time.time() - args.started + sum(d.seconds for d in done if d.reused)
    report(recipe, timings(done, installed_s, total_s, recipe.run_dir), console)
    return 0


def timings(done: list[Done], installed_s: float, total_s: float, run_dir: Path) -> dict:
    """Seconds by stage and in total. If every stage was reused: the seconds of the first run."""
    kept = run_dir / "summary.json"
    if kept.exists() and all(d.reused for d in done):
        summary = json.loads(kept.read_text())
        return {"seconds": summary["seconds"], "stage_seconds": summary["stage_seconds"]}
    by_stage = {"install": installed_s, **{d.stage.name: d.seconds for d in done}}
    return {"seconds": total_s, "stage_seconds": by_stage}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and sampling")
    parser.add_argument("--num-rollout", type=int, default=NUM_ROLLOUT, help="rollouts of GRPO")
    parser.add_argument("--run-dir", type=Path, help="default: runs/quickstart[-seedN]")
    parser.add_argument(
        "--started", type=float, default=time.time(), help="start of the command, Unix seconds"
    )
    args = parser.parse_args()
    if args.run_dir is None:
        args.run_dir = (
            ROOT / "runs" / (f"quickstart-seed{args.seed}" if args.seed else "quickstart")
        )
    return args


def shown(path: Path) -> Path:
    """The path relative to the repository, where the commands run, if it lies inside."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
