"""The imports between rooms, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vime"

# A room imports only from lower rooms. Rooms of equal height do not import each other.
HEIGHT = {
    "errors": 0,
    "files": 0,
    "patches": 0,
    "types": 1,
    "platform": 1,
    "observe": 2,
    "plugins": 2,
    "algorithms": 2,
    "rollout.rm_hub": 2,
    "config": 3,
    "backends.megatron.hf": 4,  # facts about model families: the plan reads them
    "plan": 5,
    "data": 6,
    "cli": 7,
    "rollout": 7,
    "weight_sync": 7,
    "backends.vllm": 8,
    "backends.megatron": 9,
    "ray": 10,
    "__main__": 11,
}
FORBIDDEN = {  # beyond what the heights forbid
    "observe": {"platform"},
    "backends.vllm": {"rollout", "rollout.rm_hub", "cli"},
    "backends.megatron": {"rollout", "rollout.rm_hub", "cli"},
    "ray": {"cli"},
}
ONLY_HOME = {  # {library: the places that may import it}
    "ray": ("vime/ray/", "train.py", "train_async.py"),
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


def sources() -> list[Path]:
    entries = [*ROOT.glob("train*.py"), *(ROOT / "tools").glob("*.py")]
    return sorted([*PACKAGE.rglob("*.py"), *entries, *(ROOT / "scripts").rglob("*.py")])


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, as "vime.data.packing" or "vime.data.packing.x"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of what you import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """ "vime.backends.vllm.client.X" -> "backends.vllm"; None outside the package."""
    parts = module.split(".")
    if parts[0] != "vime" or len(parts) == 1:
        return None
    inner = [".".join(parts[1:end]) for end in (4, 3)]
    known = [name for name in inner if name in HEIGHT]
    return known[0] if known else inner[1] if parts[1] == "backends" else parts[1]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_room_has_a_height():
    rooms = {room(name_of(p)) for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE}
    assert rooms - {"backends.__init__"} <= set(HEIGHT)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_imports_point_down(path):
    here = room(name_of(path))
    if here not in HEIGHT:  # an empty __init__.py
        assert not list(imported(path))
        return
    for module in imported(path):
        there = room(module)
        if there is None or there == here:
            continue
        assert HEIGHT[there] < HEIGHT[here], f"{here} imports {module}"
        assert there not in FORBIDDEN.get(here, ()), f"{here} imports {module}"


@pytest.mark.parametrize("library", ONLY_HOME)
def test_a_library_has_one_home(library):
    users = [
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if any(module.split(".")[0] == library for module in imported(path))
    ]
    assert users
    assert [user for user in users if not user.startswith(ONLY_HOME[library])] == []


def test_rooms_above_no_stack_import_without_it():
    """Rooms that start neither Ray, Megatron nor vLLM work where these are not installed."""
    rooms = ("config", "cli", "algorithms", "data", "rollout", "observe")
    modules = [name_of(p) for r in rooms for p in (PACKAGE / r).rglob("*.py")]
    modules = [name.removesuffix(".__init__") for name in modules]
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
