"""How the time of a CPU training step is spent, and the framework's own share of it.

    make bench            runs the quickstart's GRPO for a few rollouts and prints the shares
    python benchmarks/cpu_step.py --metrics runs/quickstart/metrics.jsonl   reads an earlier run

A step is one rollout of 32 x 8 samples with its optimizer step and its weight update. Evaluations
and checkpoints do not count. Rollout, log-probabilities, training and weight update time
themselves; the rest of the step is the framework's own share: batching, Ray's calls and object
store, logging, waiting. Rollout includes the HTTP calls and the grading, which runs while other
samples are generated.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, on_this_cpu, quartiles, save  # noqa: E402
from vime.observe import read_metrics  # noqa: E402
from vime.observe.reading import REWARD, STEP_TIME, phase_seconds  # noqa: E402

RESULT = RESULTS / "cpu_step.json"
RUN_DIR = Path("runs/bench-cpu-step")
NUM_ROLLOUT = 12
WARM_UP = 2  # the first steps fill caches and start threads
TARGET = 0.05
WORK = ("rollout", "log-probs", "train", "sync")  # "reward" is part of "rollout"
BESIDES = ("eval", "save")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of an earlier run")
    parser.add_argument("--num-rollout", type=int, default=NUM_ROLLOUT)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    steps = step_shares(read_metrics(args.metrics or run(args.num_rollout)))
    figures = summarize(steps)
    show(figures)
    save(args.output, figures)
    print(f"written to {args.output}")
    return 0


def run(num_rollout: int) -> Path:
    """Runs GRPO for a few rollouts; its metrics.jsonl. Assets of earlier calls are reused."""
    from scripts.quickstart.recipe import Recipe
    from scripts.quickstart.stages import run_stages

    os.chdir(ROOT)
    recipe = Recipe(RUN_DIR, seed=0, num_rollout=num_rollout)
    (RUN_DIR / "stages/grpo.json").unlink(missing_ok=True)  # measure again each time
    run_stages(recipe.stages(), RUN_DIR / "stages", print)
    return recipe.metrics


def step_shares(records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Seconds of the step, its phases and "framework", for each training step after the warm-up.

    Raises ValueError without such a step.
    """
    steps = []
    for record in records:
        if REWARD not in record or not isinstance(record.get(STEP_TIME), (int, float)):
            continue
        phases = phase_seconds(record)
        step = record[STEP_TIME] - sum(phases.get(p, 0.0) for p in BESIDES)
        work = {p: phases.get(p, 0.0) for p in WORK}
        grading = phases.get("reward", 0.0)
        framework = step - sum(work.values())
        steps.append({"step": step, **work, "reward": grading, "framework": framework})
    if len(steps) <= WARM_UP:
        raise ValueError(
            f"{len(steps)} training steps are too few; the first {WARM_UP} do not count"
        )
    return steps[WARM_UP:]


def summarize(steps: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Figures for the result file: medians over steps, quartiles as spread."""
    common = {**on_this_cpu(), "num_steps": len(steps)}
    figures = []
    for name in steps[0]:
        seconds = [s[name] for s in steps]
        figures.append(
            {"name": f"cpu_step/{name}_time", "unit": "s", **quartiles(seconds), **common}
        )
    shares = [s["framework"] / s["step"] for s in steps]
    figures.append(
        {"name": "cpu_step/framework_share", "unit": "1", **quartiles(shares), **common,
         "target": TARGET}
    )  # fmt: skip
    return figures


def show(figures: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    seconds = {f["name"].split("/")[1].removesuffix("_time"): f for f in figures}
    share = seconds.pop("framework_share")
    whole = seconds["step"]["value"]
    table = Table(box=None, header_style="dim")
    for name in ("part of a step", "median s", "quartiles", "share"):
        table.add_column(name, justify="left" if name == "part of a step" else "right")
    for name, figure in seconds.items():
        low, high = figure["spread"]
        label = "grading, within rollout" if name == "reward" else name
        row = (label, f"{figure['value']:.3f}", f"{low:.3f} to {high:.3f}")
        table.add_row(*row, f"{figure['value'] / whole:.1%}")
    Console().print(table)
    verdict = "within" if share["value"] <= TARGET else "above"
    print(
        f"framework's own share: {share['value']:.1%}, {verdict} the target of {TARGET:.0%}; "
        f"{share['num_steps']} steps on {share['device']}"
    )


if __name__ == "__main__":
    sys.exit(main())
