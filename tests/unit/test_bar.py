"""The converters' progress bar, with and without a terminal."""

from __future__ import annotations

import io

from vime.observe.bar import ByteBar


def test_a_pipe_gets_a_line_every_few_seconds_and_nothing_for_quick_work():
    now, out = [0.0], io.StringIO()
    with ByteBar("writing", 4_000_000_000, stream=out, clock=lambda: now[0]) as bar:
        for second in (1, 2, 6, 7, 12):
            now[0] = second
            bar.add(500_000_000)
    assert out.getvalue().splitlines() == [
        "writing: 38% of 4.00 GB, 10 s left",
        "writing: 62% of 4.00 GB, 7 s left",
    ]


def test_a_silent_rank_prints_nothing():
    now, out = [0.0], io.StringIO()
    with ByteBar("writing", 10, shown=False, stream=out, clock=lambda: now[0]) as bar:
        now[0] = 60
        bar.add(5)
    assert out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar():
    out = Terminal()
    with ByteBar("writing", 1_000_000, stream=out) as bar:
        bar.add(1_000_000)
    assert "writing" in out.getvalue()
    assert "1.0/1.0 MB" in out.getvalue()
