"""The imports between files and rooms of vime, which docs/architecture.md draws."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.tables import table_in
from tools.imports import (
    HEIGHT,
    ROOT,
    WINGS,
    between_rooms,
    circles,
    imports,
    named_in,
    picture,
    room,
    sources,
)

FORBIDDEN = {  # beyond what the heights forbid: who may not import what
    "observe": ("platform",),
    "backends.vllm": ("rollout", "rollout.rm_hub", "cli"),
    "backends.megatron": ("rollout", "rollout.rm_hub", "cli"),
    "ray": ("cli",),
}
ONLY_HOME = {  # {library: the places that may import it}
    "ray": ("vime/ray/", "train.py", "train_async.py", "scripts/clusters/"),
    "megatron": ("vime/backends/megatron/",),
    "vllm": ("vime/backends/vllm/plugin",),
    # save.py: Megatron's checkpoints hold a Namespace
    "argparse": (
        "vime/cli/",
        "tools/",
        "scripts/",
        "vime/backends/megatron/checkpoints/save.py",
    ),
}


def test_no_file_imports_a_file_that_imports_it():
    """Imports inside functions and for type checkers count too."""
    assert circles(imports()) == []


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [["a", "b", "c"]]


def test_every_room_has_a_height():
    assert set(between_rooms()) == set(HEIGHT)
    for name in ("vime", *(f"vime.{wing}" for wing in WINGS)):  # they stand in no room
        assert imports().get(name, set()) == set()


@pytest.mark.parametrize("module", sources())
def test_imports_point_down(module):
    here = room(module)
    for other in imports()[module]:
        there = room(other)
        if there != here:
            assert HEIGHT[there] < HEIGHT[here], f"{here} imports {other}"
        for above, below in FORBIDDEN.items():
            assert not (here.startswith(above) and there in below), f"{here} imports {other}"


def test_the_picture_is_of_these_imports():
    assert table_in("architecture.md", "rooms") == picture(), "run: make docs"


@pytest.mark.parametrize("library", ONLY_HOME)
def test_a_library_has_one_home(library):
    scripts = [*(ROOT / "tools").glob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    users = [
        path.relative_to(ROOT).as_posix()
        for path in [*sources().values(), *scripts]
        if any(module.split(".")[0] == library for module in named_in(path))
    ]
    assert users
    assert [user for user in users if not user.startswith(ONLY_HOME[library])] == []


def test_rooms_that_do_not_use_the_stack_import_without_it():
    """Rooms that start neither Ray, Megatron nor vLLM work where these are not installed."""
    rooms = ("config", "cli", "algorithms", "data", "rollout", "observe")
    modules = [name for name in sources() if name.startswith(tuple(f"vime.{r}" for r in rooms))]
    code = (
        "import importlib, sys\n"
        "for name in ('ray', 'megatron', 'vllm', 'vllm_router'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_facts_about_model_families_are_read_without_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'megatron'): sys.modules[name] = None\n"
        "import vime.backends.megatron.hf.registry, vime.backends.megatron.hf.check\n"
        "import vime.plan.shape\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
