"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from vime.files import write_text, written_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_one_before_it_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new folder" / "state.json"
    write_text(path, "old")
    write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert names(path.parent) == ["state.json"]


def test_an_error_in_the_middle_keeps_the_old_file(tmp_path):
    path = tmp_path / "state.json"
    write_text(path, "old")

    def fail_half_way():
        with written_whole(path) as partial:
            partial.write_text("half")
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state.json"]


def test_a_process_killed_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.json"
    write_text(path, "old")
    code = (
        "import os, pathlib, signal, sys\n"
        "from vime.files import written_whole\n"
        "with written_whole(pathlib.Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_two_writers_do_not_write_to_one_partial_file(tmp_path):
    """Their process ids may be equal, if they are on two nodes."""
    path = tmp_path / "state.json"
    with written_whole(path) as first:
        first.write_text("first")
        write_text(path, "second")
    assert path.read_text() == "first"
