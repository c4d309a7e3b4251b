"""Pages for readers name only files, headings, flags, functions and commands that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from vime.cli.flags import all_flags

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md"))
# Programs whose command lines take flags of their own.
PROGRAMS = [
    *sorted((ROOT / "tools").glob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "scripts").rglob("*.py")),
]
OTHER_PROGRAMS = ("hf download", "pip install", "docker ", "sbatch ", "scancel ", "kubectl ")
FOLDERS = "vime|tests|benchmarks|scripts|examples|docs|tools|docker|requirements"


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors that a renderer makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@each_page
def test_files_that_a_page_names_exist(page):
    named = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*{{}},-]*[\w/*}}])", page.read_text())
    named += re.findall(r"(?<![\w/])((?:unit|cpu|gpu)/test_\w+\.py)", page.read_text())
    for name in named:
        pattern = re.sub(r"[A-Z]{4,}\b", "*", name)  # NAME stands for any name
        places = [ROOT.glob(pattern), (ROOT / "tests").glob(pattern)]
        assert any(map(list, places)), f"{name}: no such file"


@each_page
def test_flags_that_a_page_names_exist(page):
    known = set(all_flags()) | program_flags()
    starts = tuple(name + "-" for name in ("--vllm", "--router"))
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.DOTALL)  # may declare flags
    for line in commands_joined(text).splitlines():
        if any(program in line for program in OTHER_PROGRAMS):
            continue
        for name in re.findall(r"(?<![\w-])--[a-z][\w-]*\*?", line):
            if name.endswith("*"):
                assert any(flag.startswith(name[:-1]) for flag in known), name
            else:
                assert name in known or name.startswith(starts), f"{name}: no such flag"


def commands_joined(text: str) -> str:
    """The text with a shell command and its continued lines on one line."""
    return re.sub(r"\\\n\s*", "", text)


@cache
def program_flags() -> set[str]:
    found = {"--help"}
    for program in PROGRAMS:
        found.update(re.findall(r'add_argument\(\s*"(--[\w-]+)"', program.read_text()))
        found.update(re.findall(r'add_argument\(\s*"-\w", "(--[\w-]+)"', program.read_text()))
    return found | {"--no-" + name[2:] for name in found}


@each_page
def test_make_targets_that_a_page_names_exist(page):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    named = re.findall(r"(?:`|^)make\s+([a-z][a-z0-9-]*)", text, re.MULTILINE)
    assert set(named) <= targets


@each_page
def test_functions_that_a_page_names_exist(page):
    for dotted in re.findall(r"(?<![\w.])((?:vime|examples)(?:\.\w+)+)", page.read_text()):
        module, name = module_and_name(dotted)
        assert module is not None, f"{dotted}: no such module"
        assert name is None or name in names_in(module), f"{dotted}: no such name"


def module_and_name(dotted: str) -> tuple[Path | None, str | None]:
    """The file of a dotted path, and the name that the path takes from this file."""
    path = ROOT.joinpath(*dotted.split("."))
    if path.is_dir():
        return path / "__init__.py", None
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py"), None
    module = path.parent.with_suffix(".py")
    return (module if module.is_file() else None), path.name


def names_in(module: Path) -> set[str]:
    found = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(target.id for target in targets if isinstance(target, ast.Name))
    return found


@each_page
def test_python_examples_compile(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)
