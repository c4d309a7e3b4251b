"""The share of tests/unit/answers.tsv on which deepscaler, math and math-verify agree with it.

    make bench-answers

Each row has an answer, a label and the right verdict by a mathematical reading. math-verify is
called alone on the same two formulas, with its defaults.
"""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vime.rollout.rm_hub import deepscaler, math  # noqa: E402

TABLE = ROOT / "tests" / "unit" / "answers.tsv"


@dataclass(frozen=True, slots=True)
class Row:
    """One answer for one label; `differs` names the graders whose verdict is not the table's."""

    topic: str
    answer: str
    label: str
    right: bool
    differs: tuple[str, ...]
    why: str


def read_table(path: Path = TABLE) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
        return [
            Row(
                row["topic"],
                row["answer"],
                row["label"],
                {"right": True, "wrong": False}[row["verdict"]],
                tuple(row["differs"].split()),
                row["why"],
            )
            for row in rows
        ]


def by_math_verify(answer: str, label: str) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    truth, given = (parse(f"${text}$", parsing_timeout=None) for text in (label, answer))
    return bool(verify(truth, given, timeout_seconds=None))


GRADERS: dict[str, Callable[[str, str], bool]] = {
    "deepscaler": lambda answer, label: bool(
        deepscaler.grade(rf"</think>\boxed{{{answer}}}", label, {})
    ),
    "math": lambda answer, label: bool(math.grade(rf"\boxed{{{answer}}}", label, {})),
    "math-verify": by_math_verify,
}


def shares(table: list[Row]) -> dict[str, float]:
    """Each grader's share of rows with the table's verdict."""
    return {
        name: sum(judge(row.answer, row.label) == row.right for row in table) / len(table)
        for name, judge in GRADERS.items()
    }


def main() -> int:
    table = read_table()
    print(f"{len(table)} rows")
    for name, share in shares(table).items():
        print(f"{name:12} {share:6.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
