"""Every flag that parses reaches code that acts on it, or is refused, or passes with a notice."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.tiny_families import TINY_MODELS
from vime.backends.megatron.hf.compare import CHOSEN, CHOSEN_OF_EXPERTS
from vime.backends.megatron.hf.registry import architecture
from vime.cli.absent_flags import ABSENT
from vime.cli.flags import MODEL_ARGS, STATED_FLAGS, all_flags, section_types
from vime.cli.megatron_flags import BF16, IDLE, STATED, is_megatrons
from vime.config import Config
from vime.config.fields import flags_in

ROOT = Path(__file__).parents[2]
ENTRY = [ROOT / "train.py", ROOT / "train_async.py"]
DECLARING = [ROOT / "vime/cli", ROOT / "vime/config"]  # they declare, check and show values

# Fields that do their work while a configuration is made: why no other code reads them.
WHILE_READING = {
    ("cluster", "offload"): "two flags in one, which hold under --colocate anyway",
    ("optimizer", "role_file"): "vime/cli/roles.py reads the file",
    ("rollout", "custom_config_path"): "its values become own_values",
    ("eval", "prompt_data"): "becomes the data sets to evaluate",
    ("algorithm", "compute_advantages"): "sft_loss has none, and other losses refuse the flag",
}


@cache
def sources() -> tuple[ast.Module, ...]:
    paths = [*ENTRY, *(ROOT / "vime").rglob("*.py")]
    acting = [p for p in paths if not any(p.is_relative_to(folder) for folder in DECLARING)]
    return tuple(ast.parse(path.read_text()) for path in acting)


def aliases(tree: ast.AST) -> dict[str, set[str]]:
    """{name: sections that it is}: `p, b = cfg.parallel, cfg.batch`, `p: ParallelConfig`."""
    found = {"settings": {"log"}, "_settings": {"log"}}  # as vime/observe calls the section
    of_type = {section.__name__: owner for owner, section in section_types().items()}

    def bind(target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each in zip(target.elts, value.elts, strict=True):
                bind(*each)
        elif isinstance(value, ast.Attribute) and value.attr in section_types():
            name = getattr(target, "id", None) or getattr(target, "attr", None)
            if name:
                found.setdefault(name, set()).add(value.attr)

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            bind(node.targets[0], node.value)
        elif isinstance(node, ast.arg) and getattr(node.annotation, "id", None) in of_type:
            found.setdefault(node.arg, set()).add(of_type[node.annotation.id])
    return found


@cache
def read_fields() -> set[tuple[str, str]]:
    """{(section, attribute)} that the acting code reads, `self.x` within a section's own methods
    and properties of `Config` included."""
    found = {place for tree in sources() for place in reads(tree)}
    config = properties(Config)
    for name, body in config.items():
        if name in {n.attr for t in sources() for n in ast.walk(t) if isinstance(n, ast.Attribute)}:
            found |= set(reads(body))
    grown = True
    while grown:
        more = {
            (owner, node.attr)
            for owner, section in section_types().items()
            for name, body in properties(section).items()
            if (owner, name) in found
            for node in ast.walk(body)
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "self"
        }
        grown = not more <= found
        found |= more
    return found


def reads(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(section, attribute) of `cfg.section.attribute` and `cfg.section.plugin("attribute")`."""
    named = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if node.func.attr in ("plugin", "plugins"):
                yield from ((owner, name) for owner in section_types() for name in names)
        if isinstance(node, ast.Attribute):
            name = getattr(node.value, "attr", None) or getattr(node.value, "id", None)
            owners = named.get(name, set()) | ({name} & section_types().keys())
            yield from ((owner, node.attr) for owner in owners)


@cache
def properties(section: type) -> dict[str, ast.AST]:
    """{name: source} of a class's methods but its checks."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    return {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name != "problems"}


def acts(owner: str, field: str) -> bool:
    """Whether a field is read, is inherited by data sets to evaluate, or works while reading."""
    spec = flags_in(section_types()[owner])[field]
    if (owner, field) in read_fields() or (owner, field) in WHILE_READING:
        return True
    source = all_flags()[spec.inherits] if spec.inherits else None
    return source is not None and acts(source.owner, source.field)


def test_every_field_with_a_flag_is_read_by_the_code_that_acts() -> None:
    fields = {(e.owner, e.field) for e in all_flags().values() if e.owner in section_types()}
    assert len(fields) > 150
    assert [place for place in sorted(fields) if not acts(*place)] == []


def test_every_reason_is_of_a_field_that_no_other_code_reads() -> None:
    fields = {(e.owner, e.field) for e in all_flags().values()}
    assert WHILE_READING.keys() <= fields
    assert [place for place in WHILE_READING if place in read_fields()] == []


def test_model_args_reach_the_model_or_are_compared_with_config_json() -> None:
    """`check.py` refuses an argument that neither config.json describes nor a run may choose."""
    described = {name for config in configs() for name in architecture(config)}
    given = {entry.field for entry in all_flags().values() if entry.owner == MODEL_ARGS}
    assert given - described - {*CHOSEN, *CHOSEN_OF_EXPERTS} == set()


def configs() -> list[dict]:
    published = (Path(__file__).parent / "hf_configs").glob("*.json")
    return [*TINY_MODELS.values(), *(json.loads(path.read_text()) for path in published)]


def test_flags_without_a_field_state_what_holds_or_give_a_notice() -> None:
    names = {name for name, entry in all_flags().items() if entry.owner == STATED_FLAGS}
    assert names == {*STATED, *IDLE, BF16}
    assert all(idle.because for idle in IDLE.values())
    assert all(stated.because for stated in STATED.values() if stated.values)


def test_no_other_flag_of_megatrons_is_taken_for_a_slip() -> None:
    others = ["--fp8-param-gather", "--moe-expert-capacity-factor", "--mtp-num-layers"]
    assert all(is_megatrons(name) or name in ABSENT for name in others)
    assert ABSENT.keys().isdisjoint(all_flags())
