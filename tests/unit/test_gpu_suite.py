"""How GPU benchmarks share GPUs and time. The jobs here note their GPUs and times."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import JOBS, TARGETS, Job, run_all

NOTE = """
import json, os, sys, time
began = time.time()
time.sleep(float(sys.argv[1]))
print(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"].split(","), began, time.time()]))
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str, int, float], Job]:
    script = tmp_path / "note.py"
    script.write_text(NOTE)
    return lambda name, gpus, seconds: Job(name, gpus, f"{script} {seconds}")


def notes(folder: Path, name: str) -> tuple[set[str], float, float]:
    gpus, began, ended = json.loads((folder / f"{name}.log").read_text())
    return set(gpus), began, ended


def test_no_gpu_serves_two_jobs_at_once(job: Callable, tmp_path: Path) -> None:
    jobs = [job("a", 1, 0.6), job("b", 2, 0.3), job("c", 1, 0.3), job("too many", 4, 0.0)]
    codes = run_all(jobs, ["4", "5", "6"], tmp_path, time.monotonic() + 120, alone=False)
    assert codes == {"a": 0, "b": 0, "c": 0}
    held = [notes(tmp_path, name) for name in "abc"]
    assert [len(gpus) for gpus, _, _ in held] == [1, 2, 1]
    for i, (mine, began, ended) in enumerate(held):
        for others, other_began, other_ended in held[:i]:
            together = began < other_ended and other_began < ended
            assert not (together and mine & others)


def test_with_alone_jobs_run_one_after_the_other(job: Callable, tmp_path: Path) -> None:
    jobs = [job("a", 1, 0.2), job("b", 1, 0.2)]
    run_all(jobs, ["0", "1"], tmp_path, time.monotonic() + 120, alone=True)
    (_, _, first_ended), (_, second_began, _) = notes(tmp_path, "a"), notes(tmp_path, "b")
    assert first_ended < second_began


def test_when_the_time_is_up_a_job_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, log = tmp_path / "parent.py", tmp_path / "slow.log"
    script.write_text(PARENT)

    def now() -> float:
        """The deadline, 1.0, as soon as the job has a child."""
        return float(log.exists() and log.read_text().endswith("\n"))

    clock = SimpleNamespace(monotonic=now, sleep=time.sleep, strftime=time.strftime)
    monkeypatch.setattr(gpu_suite, "time", clock)
    codes = run_all([Job("slow", 1, str(script))], ["0"], tmp_path, 1.0, alone=False)
    assert codes["slow"] != 0
    assert not alive(int(log.read_text()))


def alive(pid: int) -> bool:
    """Whether the process runs. A zombie does not count as running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_every_job_names_an_existing_script_or_module() -> None:
    root = Path(__file__).resolve().parents[2]
    for each in JOBS:
        script, *words = each.command.split()
        if script == "-m":
            assert find_spec(words[0]), each.name
        else:
            assert (root / script).is_file(), each.name
    assert all(name and os.path.basename(name) == name for name in TARGETS)
