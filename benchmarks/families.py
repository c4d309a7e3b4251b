"""Compares every model family in every layout with Hugging Face: the table in docs/models.md.

    make bench-families                              measures, writes the results and the table
    python -m benchmarks.families --only Moonlight   one model; prints, writes nothing

The models are tiny and random, in float32. They run on one and two gloo ranks. Then one vLLM engine
for each model receives the weights of another random model from a trainer. The whole takes ten
minutes on two cores. The exit code is 1 if a figure is out of bounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.records import RESULTS, on_this_cpu, save
from benchmarks.tables import markdown, put

ROOT = Path(__file__).resolve().parents[1]
RESULT = RESULTS / "families.json"
sys.path.insert(0, str(ROOT / "tests" / "cpu"))

from live_families import LiveFinding, examine_live  # noqa: E402
from model_families import LAYOUTS, Finding, cases, examine, write_model  # noqa: E402
from ranks import run_ranks  # noqa: E402

from tests.tiny_families import TINY_MODELS  # noqa: E402

MAX_LOGIT, MAX_GRADIENT = 1e-4, 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="update results and docs/models.md")
    parser.add_argument("--only", choices=TINY_MODELS, help="one model")
    given = parser.parse_args()
    models = list(TINY_MODELS) if given.only is None else [given.only]
    found = measure(models)
    live = {model: engine_of(model) for model in models}
    table = table_of(models, found, live)
    print(table)
    if given.write:
        put("models.md", "table", table)
        save(RESULT, as_results(found, live))
    return int(not all(map(is_good, found.values())) or not all(f.is_good for f in live.values()))


def measure(models: list[str]) -> dict[tuple[str, str], Finding]:
    """{(model, layout): the worst of its ranks}"""
    found = {}
    with tempfile.TemporaryDirectory(prefix="vime-families-") as tmp:
        for model in models:
            write_model(Path(tmp, model), model)
        for num_ranks in (1, 2):
            todo = [case for case in cases(num_ranks) if case[0] in models]
            ranks = run_ranks(examine, num_ranks, root=Path(tmp), cases=todo, timeout_s=900.0)
            found |= {case: worst(rank[i] for rank in ranks) for i, case in enumerate(todo)}
    return found


def engine_of(model: str) -> LiveFinding:
    with tempfile.TemporaryDirectory(prefix="vime-families-") as tmp:
        return examine_live(Path(tmp), model)


def worst(findings) -> Finding:
    findings = list(findings)
    return Finding(
        max(f.logits for f in findings if f.logits is not None),
        max(f.gradient for f in findings),
        findings[0].round_trip,
    )


def is_good(f: Finding) -> bool:
    return f.logits < MAX_LOGIT and f.gradient < MAX_GRADIENT and f.round_trip


def table_of(
    models: list[str],
    found: dict[tuple[str, str], Finding],
    live: dict[str, LiveFinding],
) -> str:
    """Markdown: a row for each model; logits / gradient / round trip by layout, then the engine."""
    rows = [["model", *LAYOUTS, "live engine"]]
    for model in models:
        cells = [found.get((model, layout)) for layout in LAYOUTS]
        engine = marked(f"{live[model].after:.0e}", live[model].is_good)
        rows.append([model, *("" if f is None else cell(f) for f in cells), engine])
    return markdown(rows)


def cell(f: Finding) -> str:
    text = f"{f.logits:.0e} / {f.gradient:.0e} / {'exact' if f.round_trip else 'DIFFERS'}"
    return marked(text, is_good(f))


def marked(text: str, good: bool) -> str:
    return text if good else f"**{text}**"


def as_results(found: dict[tuple[str, str], Finding], live: dict[str, LiveFinding]) -> list[dict]:
    common = {"peer": "transformers", "spread": None, **on_this_cpu()}
    bad = sum(not is_good(f) for f in found.values())
    bad_live = sum(not f.is_good for f in live.values())
    layouts = {f"{model}, {layout}": asdict(f) for (model, layout), f in found.items()}
    engines = {model: asdict(f) for model, f in live.items()}
    return [
        {"name": "families/out_of_bounds", "value": bad, "unit": "count", **common}
        | {"cases": layouts},
        {"name": "families/live_engine/out_of_bounds", "value": bad_live, "unit": "count", **common}
        | {"cases": engines},
    ]


if __name__ == "__main__":
    sys.exit(main())
