"""The imports between the files of vime, the rooms that hold the files, and a picture of both.

`make docs` puts the picture into docs/architecture.md.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From top to bottom. A room imports only from lower rows, so not from rooms in its own row.
ROWS = (
    ("train", "train_async", "__main__"),
    ("ray",),
    ("backends.megatron.trainer",),
    ("backends.megatron.training",),
    ("backends.megatron.checkpoints", "backends.megatron.memory"),
    ("backends.megatron.model", "backends.megatron.weights"),
    ("backends.megatron.chunks",),
    ("backends.megatron.parallel",),
    ("backends.megatron.compat", "backends.vllm"),
    ("backends.megatron.kernels", "rollout", "weight_sync", "cli"),
    ("data",),
    ("plan",),
    ("backends.megatron.hf",),
    ("config",),
    ("plugins", "algorithms", "observe", "rollout.rm_hub", "rendezvous"),
    ("types", "platform", "addresses"),
    ("errors", "files", "number_lists", "patches"),
)
HEIGHT = {room: -row for row, rooms in enumerate(ROWS) for room in rooms}
WINGS = ("backends.megatron", "backends", "rollout")  # their parts are rooms too


def sources() -> dict[str, Path]:
    """{"vime.data.packing": its file}, including train.py and train_async.py."""
    files = [*ROOT.glob("train*.py"), *(ROOT / "vime").rglob("*.py")]
    return {_name(path): path for path in sorted(files)}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def named_in(path: Path) -> Iterator[str]:
    """Every name that a file imports, also in functions and under TYPE_CHECKING: "os.path", ..."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: a relative import; write the module's whole name")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports() -> dict[str, set[str]]:
    """{file: the files of vime that it imports}, by module name."""
    files = sources()

    def file_of(name: str) -> str | None:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name or None

    return {
        module: {file for name in named_in(path) if (file := file_of(name)) and file != module}
        for module, path in files.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every group of nodes that reach each other."""
    beyond = {node: _reachable(graph, node) for node in graph}
    found = {
        frozenset(other for other in beyond[node] if node in beyond[other])
        for node in graph
        if node in beyond[node]
    }
    return sorted(sorted(group) for group in found)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += graph[node]
    return seen


def room(module: str) -> str:
    """ "vime.backends.vllm.client" -> "backends.vllm". A file outside all rooms is its own room."""
    name = module.removeprefix("vime.")
    for wing in WINGS:
        part = name.removeprefix(f"{wing}.").partition(".")[0]
        if name.startswith(f"{wing}.") and f"{wing}.{part}" in HEIGHT:
            return f"{wing}.{part}"
    return name.partition(".")[0]


def between_rooms() -> dict[str, set[str]]:
    """{room: the rooms that it imports}."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, others in imports().items():
        if module not in ("vime", "vime.backends", "vime.backends.megatron"):  # in no room
            arrows[room(module)] |= {room(other) for other in others} - {room(module)}
    return dict(arrows)


def picture() -> str:
    """The rooms and their arrows in Mermaid. Arrows that other arrows imply are left out."""
    graph = between_rooms()
    lines = ["```mermaid", "flowchart TD"]
    inside = "backends.megatron."
    lines += [f'  subgraph megatron ["{inside[:-1].replace(".", "/")}"]']
    lines += [f"    {_node(name, inside)}" for name in HEIGHT if name.startswith(inside)]
    lines += ["  end"]
    lines += [f"  {_node(name)}" for name in HEIGHT if not name.startswith(inside)]
    for here in HEIGHT:
        implied = set().union(*(_reachable(graph, there) for there in graph[here]))
        lines += [
            f"  {_id(here)} --> {_id(there)}"
            for there in HEIGHT
            if there in graph[here] and there not in implied
        ]
    return "\n".join([*lines, "```", ""])


def _node(name: str, inside: str = "") -> str:
    label = name.removeprefix(inside).replace(".", "/")
    is_file = (ROOT / "vime" / f"{name.replace('.', '/')}.py").is_file() or name.startswith("train")
    return f'{_id(name)}["{label}{".py" if is_file and name != "__main__" else ""}"]'


def _id(name: str) -> str:
    return name.replace(".", "_")


if __name__ == "__main__":
    sys.stdout.write(picture())
