"""Tables that benchmarks keep up to date in pages of docs/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def markdown(rows: Sequence[Iterable[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = (list(row) for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def put(page: str, name: str, table: str) -> None:
    """Replaces what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in docs/PAGE.

    Raises ValueError when the page lacks one of them.
    """
    path = ROOT / "docs" / page
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, rest = path.read_text().split(begin)
    path.write_text(before + begin + table + end + rest.split(end)[1])
