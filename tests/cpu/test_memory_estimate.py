"""A trainer holds as much memory as the plan says. Peaks need a GPU: benchmarks/memory.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_weights_gradients_and_optimizer_are_as_large_as_planned():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/memory_case.py"), "tiny"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for component in ("weights", "gradients", "optimizer"):
        estimate, measured = found[component]
        assert estimate == pytest.approx(measured, rel=1e-3), component
