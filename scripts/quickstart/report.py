"""The quickstart's last stage: a table, a plot, a solved problem, and a command to continue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.quickstart.recipe import EVAL_NAME, Recipe, latest_export
from scripts.quickstart.task import SHARE_RIGHT
from vime.files import write_text
from vime.observe import read_metrics
from vime.observe.plot import learning_curves, plot_learning
from vime.observe.progress import clock_time

TABLE_ROWS = 10


def report(recipe: Recipe, timings: dict[str, Any], console: Console) -> dict[str, Any]:
    """Write summary.json and learning.png, and print the results."""
    records = read_metrics(recipe.metrics)
    model = latest_export(recipe.hf_exports)
    summary = summarize(records) | timings | {"seed": recipe.seed, "model": str(model)}
    write_json(recipe.run_dir / "summary.json", summary)
    plot = plot_learning(
        records,
        recipe.run_dir / "learning.png",
        title="Three-digit addition: share of right answers",
        reference=(SHARE_RIGHT, "right among the demonstrations"),
    )
    console.print()
    console.print(learning_table(records))
    show_solved_problem(recipe.warm_model, model, recipe.data / "eval.jsonl", console)
    stages = ", ".join(f"{name} {s:.0f} s" for name, s in timings["stage_seconds"].items())
    console.print(
        f"held-out pass rate  [bold]{summary['eval_before']:.3f} -> {summary['eval_after']:.3f}"
        f"[/bold] in {summary['num_rollout']} rollouts; "
        f"{clock_time(summary['seconds'])} in all ({stages})\n"
        f"plot      {plot}\n"
        f"metrics   {recipe.metrics}\n"
        f"model     {model}  (Hugging Face format)\n"
        f"continue  {recipe.continue_command(summary['num_rollout'])}"
    )
    return summary


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """{"eval_before", "eval_after", "num_rollout"}: the evaluations before and after training.

    Raises ValueError without an evaluation before training.
    """
    curve = learning_curves(records)[1].get(EVAL_NAME, [])
    if not curve or curve[0][0] != 0:
        raise ValueError(f"metrics.jsonl has no eval/{EVAL_NAME} from before the first rollout")
    return {
        "eval_before": curve[0][1],
        "eval_after": curve[-1][1],
        "num_rollout": records[-1]["step"],
    }


def learning_table(records: list[dict[str, Any]]) -> Table:
    """About ten evaluations, with the mean reward and seconds of the rollouts between them."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("rollouts", "held-out pass rate", "reward", "response tokens", "s a rollout"):
        table.add_column(name, justify="right")
    key = f"eval/{EVAL_NAME}"
    evaluated = [i for i, r in enumerate(records) if key in r]
    every = max(1, -(-len(evaluated) // TABLE_ROWS))
    shown = evaluated[::every]
    if evaluated and shown[-1] != evaluated[-1]:
        shown.append(evaluated[-1])
    previous = -1
    for i in shown:
        between = records[previous + 1 : i + 1]
        table.add_row(
            str(records[i]["step"]),
            f"{records[i][key]:.3f}",
            mean(between, "rollout/raw_reward", "{:.3f}"),
            mean(between, "rollout/response_len/mean", "{:.1f}"),
            mean(between, "perf/step_time", "{:.2f}"),
        )
        previous = i
    return table


def mean(records: list[dict[str, Any]], name: str, form: str) -> str:
    values = [r[name] for r in records if isinstance(r.get(name), (int, float))]
    return form.format(sum(values) / len(values)) if values else "-"


def show_solved_problem(before: Path, after: Path, eval_file: Path, console: Console) -> None:
    """Print one held-out problem with the model's greedy answers before and after GRPO."""
    from scripts.quickstart.answers import greedy_answers

    rows = [json.loads(line) for line in eval_file.read_text().splitlines()[:32]]
    olds, news = greedy_answers(before, rows), greedy_answers(after, rows)
    marked = [(f"{{{r['label']}}}" in o, f"{{{r['label']}}}" in n, r, o, n)
              for r, o, n in zip(rows, olds, news, strict=True)]  # fmt: skip
    _, _, row, old, new = min(marked, key=lambda m: (m[0], not m[1]))  # best: wrong, then right
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 4, 0, 0))
    table.add_column(f"{row['prompt'][-1]['content']}  ({row['label']})")
    table.add_column("before GRPO")
    table.add_column("after GRPO")
    table.add_row("greedy, held out", old, new)
    console.print()
    console.print(table, markup=False)
    console.print()


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
