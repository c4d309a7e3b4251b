"""Trains the quickstart's model with every advantage estimator: held-out pass rates over time.

    python benchmarks/estimators.py                all; about two minutes each on two cores
    python benchmarks/estimators.py --only rloo    some; the results of the others stay
    python benchmarks/estimators.py --write        also puts table and plot into docs/algorithms.md

All estimators start from one warmed-up checkpoint with the settings of scripts/run-tiny-cpu.sh. But
each rollout has two optimizer steps, so ratios differ from 1 and so do the losses of the
estimators. `FLAGS` holds the clip ranges. The pass rate is over 256 held-out problems with 4
samples each. An interrupted estimator starts again; a finished one is kept until its settings
change. The exit code is 1 if an estimator ends no higher than it began.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, on_this_cpu, save  # noqa: E402
from benchmarks.tables import markdown, put  # noqa: E402
from scripts.quickstart.recipe import EVAL_NAME, GRPO_SCRIPT, Recipe  # noqa: E402
from scripts.quickstart.stages import Stage, run_stages  # noqa: E402
from vime.config.fields import flags_in  # noqa: E402
from vime.config.sections.algorithm import AlgorithmConfig  # noqa: E402
from vime.observe import read_metrics  # noqa: E402
from vime.observe.plot import INK, learning_curves, plain  # noqa: E402

RESULT = RESULTS / "estimators.json"
PLOT = ROOT / "docs/estimators.png"
RUN_DIR = Path("runs/bench-estimators")
NUM_ROLLOUT, EVAL_INTERVAL = 12, 3
ALL = ["--num-steps-per-rollout", "2", "--eval-interval", str(EVAL_INTERVAL)]
FLAGS: dict[str, list[str]] = {
    "cispo": ["--eps-clip", "1", "--eps-clip-high", "0.28"],  # no lower bound, as in its paper
    "gspo": ["--eps-clip", "3e-4", "--eps-clip-high", "4e-4"],  # as in its paper
    "ppo": ["--critic-lr", "1e-3", "--lambd", "0.95", "--normalize-advantages"],
}
COLORS = (
    "#0b6e4f",
    "#b44d12",
    "#5b3fa0",
    "#1769aa",
    "#a3195b",
    "#6b7a00",
    "#3f4e5a",
    "#c08a00",
    "#00838f",
)

Curve = list[tuple[int, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-rollout", type=int, default=NUM_ROLLOUT)
    parser.add_argument("--write", action="store_true", help="update docs/algorithms.md")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    os.chdir(ROOT)
    recipe = Recipe(RUN_DIR, seed=args.seed, num_rollout=args.num_rollout)
    curves = {name: train(recipe, name) for name in args.only}
    figures = with_earlier(args.output, [figure(n, c, args.seed) for n, c in curves.items()])
    curves = {str(f["estimator"]): [(x, y) for x, y in f["curve"]] for f in figures}
    table = table_of(curves)
    print(table)
    save(args.output, figures)
    plot = plot_curves(curves, PLOT if args.write else RUN_DIR / "estimators.png")
    print(f"written to {args.output} and {plot}")
    if args.write:
        put("algorithms.md", "estimators", table)
    behind = [name for name, curve in curves.items() if curve[-1][1] <= curve[0][1]]
    if behind:
        print(f"no better than at the start: {', '.join(behind)}")
    return int(bool(behind))


def names() -> list[str]:
    """The choices of --advantage-estimator."""
    return list(flags_in(AlgorithmConfig)["advantage_estimator"].choices)


def train(recipe: Recipe, name: str) -> Curve:
    """[(rollouts trained, held-out pass rate)] of one estimator; trains it if necessary."""
    folder = RUN_DIR / name
    variables = {
        "RUN_DIR": str(folder),
        "SEED": str(recipe.seed),
        "NUM_ROLLOUT": str(recipe.num_rollout),
        "HF_CHECKPOINT": str(recipe.warm_model),
        "REF_LOAD": str(recipe.warm_torch_dist),
        "PROMPT_DATA": str(recipe.data / "train.jsonl"),
        "EVAL_DATA": str(recipe.data / "eval.jsonl"),
    }
    command = ["bash", str(GRPO_SCRIPT.relative_to(ROOT)), "--advantage-estimator", name]
    command += ALL + FLAGS.get(name, [])
    own = Stage(
        name,
        f"{name}, {recipe.num_rollout} rollouts",
        lambda: recipe.call(name, command, variables),
        (folder,),
        (GRPO_SCRIPT.read_text(), *command, *(f"{k}={v}" for k, v in variables.items())),
    )
    run_stages([*recipe.stages()[:3], own], RUN_DIR / "stages", print)
    return learning_curves(read_metrics(folder / "metrics.jsonl"))[1][EVAL_NAME]


def figure(name: str, curve: Curve, seed: int) -> dict[str, Any]:
    """An entry of the result file: the rise of the held-out pass rate."""
    before, after = curve[0][1], curve[-1][1]
    return {
        "name": f"estimators/{name}_gain",
        "estimator": name,
        "unit": "1",
        "value": round(after - before, 4),
        "before": round(before, 4),
        "after": round(after, 4),
        "curve": [[x, round(y, 4)] for x, y in curve],
        "flags": [*ALL, *FLAGS.get(name, [])],
        "seed": seed,
        "target": "above 0",
        **on_this_cpu(),
    }


def with_earlier(output: Path, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`figures`, and the result file's figures of other estimators, in the flag's order."""
    earlier = json.loads(output.read_text()) if output.exists() else []
    by_name = {f["estimator"]: f for f in [*earlier, *figures]}
    return [by_name[name] for name in names() if name in by_name]


def table_of(curves: Mapping[str, Curve]) -> str:
    """Markdown: a row for each estimator, a column for each number of rollouts trained."""
    trained = sorted({x for curve in curves.values() for x, _ in curve})
    rows = [["rollouts trained", *map(str, trained)]]
    for name, curve in curves.items():
        rates = dict(curve)
        rows.append([f"`{name}`", *(f"{rates[x]:.3f}" if x in rates else "" for x in trained)])
    return markdown(rows)


def plot_curves(curves: Mapping[str, Curve], path: Path) -> Path:
    """A PNG with one line for each estimator, named at its end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plot = Figure(figsize=(9, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(plot)
    axes = plot.add_subplot()
    ends = {name: curves[name][-1][1] for name in sorted(curves, key=lambda n: curves[n][-1][1])}
    heights = spread_out(list(ends.values()), 0.045)
    for name, color, height in zip(ends, COLORS * len(ends), heights, strict=False):
        x, y = zip(*curves[name], strict=True)
        axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3.5)
        axes.annotate(
            f"{name} {y[-1]:.2f}", (1.015, height), xycoords=("axes fraction", "data"),
            va="center", color=color, fontsize=9, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(0, max(x for curve in curves.values() for x, _ in curve))
    axes.set_ylim(0, 1)
    axes.set_xlabel("rollouts trained", color=INK)
    title = "Held-out pass rate by advantage estimator"
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=12)
    plain(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path)
    return path


def spread_out(heights: list[float], distance: float) -> list[float]:
    """Ascending heights of labels, pushed apart to `distance` around the same mean."""
    apart: list[float] = []
    for height in heights:
        apart.append(max(height, apart[-1] + distance) if apart else height)
    shift = (sum(apart) - sum(heights)) / max(len(heights), 1)
    return [height - shift for height in apart]


if __name__ == "__main__":
    sys.exit(main())
