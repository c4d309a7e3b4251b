"""Every family in every layout against Hugging Face, as the table in docs/models.md.

    python benchmarks/families.py            prints the table
    python benchmarks/families.py --write    puts it into docs/models.md

Tiny random models, float32, CPU, one and two gloo ranks: some two minutes on two cores. Exit code 1
when a figure is out of bounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cpu"))

from model_families import LAYOUTS, MODELS, Finding, cases, examine, write_model  # noqa: E402
from ranks import run_ranks  # noqa: E402

BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
MAX_LOGIT, MAX_GRADIENT = 1e-4, 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="update docs/models.md")
    given = parser.parse_args()
    found = measure()
    table = table_of(found)
    print(table)
    if given.write:
        page = ROOT / "docs" / "models.md"
        before, rest = page.read_text().split(BEGIN)
        page.write_text(before + BEGIN + table + END + rest.split(END)[1])
    return int(not all(map(is_good, found.values())))


def measure() -> dict[tuple[str, str], Finding]:
    """{(model, layout): the worst of its ranks}"""
    found = {}
    with tempfile.TemporaryDirectory(prefix="vime-families-") as tmp:
        for model in MODELS:
            write_model(Path(tmp, model), model)
        for num_ranks in (1, 2):
            todo = cases(num_ranks)
            ranks = run_ranks(examine, num_ranks, root=Path(tmp), cases=todo, timeout_s=900.0)
            found |= {case: worst(rank[i] for rank in ranks) for i, case in enumerate(todo)}
    return found


def worst(findings) -> Finding:
    findings = list(findings)
    return Finding(
        max(f.logits for f in findings if f.logits is not None),
        max(f.gradient for f in findings),
        findings[0].round_trip,
    )


def is_good(f: Finding) -> bool:
    return f.logits < MAX_LOGIT and f.gradient < MAX_GRADIENT and f.round_trip


def table_of(found: dict[tuple[str, str], Finding]) -> str:
    """Markdown: a row per model, a column per layout; logits / gradient / round trip."""
    rows = [["model", *LAYOUTS], ["---"] * (len(LAYOUTS) + 1)]
    for model in MODELS:
        cells = [found.get((model, layout)) for layout in LAYOUTS]
        rows.append([model, *("" if f is None else cell(f) for f in cells)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(f: Finding) -> str:
    text = f"{f.logits:.0e} / {f.gradient:.0e} / {'exact' if f.round_trip else 'DIFFERS'}"
    return text if is_good(f) else f"**{text}**"


if __name__ == "__main__":
    sys.exit(main())
