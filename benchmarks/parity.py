"""Compares loss, gradient and weights in every layout and batching with plain autograd.

    python benchmarks/parity.py            prints the table, writes results/gradient_parity.json
    python benchmarks/parity.py --write    also puts the table into docs/algorithms.md

Tiny random models take two optimizer steps in float32 over 1, 2 and 4 gloo ranks; one process takes
the same steps in float64. tests/cpu/parity.py describes the steps. The run takes some 80 s on two
busy cores. The exit code is 1 if a figure is out of bounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cpu")]

from parity import (  # noqa: E402
    CASES,
    EXPERTS,
    MAX_GRADIENT,
    MAX_LOSS,
    Apart,
    Case,
    all_expected,
    apart,
    largest,
    run,
    write_models,
)

from benchmarks.records import RESULTS, on_this_cpu, save  # noqa: E402
from benchmarks.tables import markdown, put  # noqa: E402

RESULT = RESULTS / "gradient_parity.json"
Found = list[tuple[int, Case, Apart]]  # number of ranks, case, the worst of its ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update docs/algorithms.md")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    found = measure()
    table = table_of(found)
    print(table)
    figures = figures_of(found)
    save(args.output, figures)
    print(f"written to {args.output}")
    if args.write:
        put("algorithms.md", "parity", table)
    return int(any(f["value"] > f["target_at_most"] for f in figures))


def measure() -> Found:
    with tempfile.TemporaryDirectory(prefix="vime-parity-") as tmp:
        root = Path(tmp)
        write_models(root)
        expected = all_expected(root)
        found = []
        for world, cases in CASES.items():
            ranks = run(root, world, timeout_s=900.0)
            for number, case in enumerate(cases):
                of_ranks = [apart(rank[number], expected[case.task]) for rank in ranks]
                found.append((world, case, largest(of_ranks)))
    return found


def table_of(found: Found) -> str:
    """Markdown: a row for each case."""
    rows = [["ranks", "layout", "model", "batching", "loss", "gradient", "weights after"]]
    for world, case, a in found:
        model = "MoE" if case.model == EXPERTS else case.model
        figures = [cell(a.loss, MAX_LOSS), cell(a.gradient, MAX_GRADIENT)]
        figures.append(cell(a.weights, MAX_GRADIENT))
        rows.append([str(world), case.name, model, case.batching, *figures])
    return markdown(rows)


def cell(value: float | None, limit: float) -> str:
    if value is None:
        return "sharded"
    return f"{value:.0e}" if value < limit else f"**{value:.0e}**"


def figures_of(found: Found) -> list[dict[str, Any]]:
    """The result file: the largest difference of each kind, and the difference of every case."""
    machine = on_this_cpu()

    def figure(kind: str, values: Mapping[str, float | None], limit: float) -> dict[str, Any]:
        return {
            "name": f"parity/{kind}_largest_relative_difference",
            "unit": "1",
            "value": max(v for v in values.values() if v is not None),
            "target_at_most": limit,
            "cases": values,
            **machine,
        }

    names = [
        f"{world} ranks, {case.model}, {case.name}, {case.batching}" for world, case, _ in found
    ]
    of_loss, of_gradient, of_weights = zip(
        *((a.loss, a.gradient, a.weights) for *_, a in found), strict=True
    )
    return [
        figure("loss", dict(zip(names, of_loss, strict=True)), MAX_LOSS),
        figure("gradient", dict(zip(names, of_gradient, strict=True)), MAX_GRADIENT),
        figure("weights", dict(zip(names, of_weights, strict=True)), MAX_GRADIENT),
    ]


if __name__ == "__main__":
    sys.exit(main())
