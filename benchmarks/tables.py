"""Tables in pages of docs/ that programs keep up to date."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def markdown(rows: Sequence[Iterable[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = (list(row) for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def put(page: str, name: str, table: str) -> None:
    """Replaces the text between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in docs/PAGE.

    Raises ValueError when the page lacks one of them.
    """
    before, _, after = _around(page, name)
    (ROOT / "docs" / page).write_text(before + table + after)


def table_in(page: str, name: str) -> str:
    """The text that `put` would replace."""
    return _around(page, name)[1]


def _around(page: str, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, rest = (ROOT / "docs" / page).read_text().split(begin)
    table, after = rest.split(end)
    return before + begin, table, end + after
