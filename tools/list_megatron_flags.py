#!/usr/bin/env python3
"""Lists the flags of a Megatron-LM tree, for vime/cli/megatron_flag_names.txt.

    python tools/list_megatron_flags.py MEGATRON_LM/megatron > vime/cli/megatron_flag_names.txt

Reads the source without importing it. A flag is a literal "--name" of megatron/training, or a field
of a configuration's dataclass, whose flag Megatron generates.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_FLAG = re.compile(r"--[a-z0-9][A-Za-z0-9_-]+")


def flags(root: Path) -> Iterator[str]:
    for path in [*root.glob("training/**/*.py"), *root.glob("core/**/*config*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                yield from _fields(node)
            elif (
                path.is_relative_to(root / "training")
                and isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and _FLAG.fullmatch(node.value)
            ):
                yield node.value


def _fields(section: ast.ClassDef) -> Iterator[str]:
    for item in section.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name = item.target.id.strip("_").replace("_", "-")
            yield f"--{name}"
            if "bool" in ast.unparse(item.annotation):
                yield f"--no-{name}"
                yield f"--disable-{name}"


if __name__ == "__main__":
    print("\n".join(sorted(set(flags(Path(sys.argv[1]))))))
