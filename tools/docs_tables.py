"""Writes the tables in docs/ that list vime's registries, and the picture of vime's imports.

python tools/docs_tables.py            writes them (make docs)
python tools/docs_tables.py --check    writes nothing; exit code 1 when a table is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import markdown, put, table_in  # noqa: E402
from tools.imports import picture  # noqa: E402
from vime.algorithms.advantages import ESTIMATORS, Estimator  # noqa: E402
from vime.algorithms.policy import clipped_policy_loss  # noqa: E402
from vime.backends.megatron.hf.registry import FAMILIES  # noqa: E402
from vime.cli.flags import section_types  # noqa: E402
from vime.config.fields import flags_in  # noqa: E402
from vime.rollout.rm_hub.registry import GRADERS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="report tables that are out of date")
    check = parser.parse_args().check
    stale = [place for place, make in TABLES.items() if table_in(*place) != make()]
    for page, name in stale:
        if check:
            print(f"docs/{page}: the table '{name}' is out of date. Run: make docs")
        else:
            put(page, name, TABLES[page, name]())
    return int(check and bool(stale))


def estimator_table() -> str:
    head = ["name", "score of a sample", "advantage of its tokens", "source"]
    return markdown([head, *map(estimator_row, ESTIMATORS)])


def estimator_row(name: str) -> list[str]:
    estimator = ESTIMATORS[name]
    score = first_sentence(estimator.baseline) if estimator.baseline else "`r`"
    if estimator.nonnegative_rewards:
        score += "; no reward may be below 0"
    links = (f"[{paper}](https://arxiv.org/abs/{paper})" for paper in estimator.papers)
    return [f"`{name}`", score, advantage_of(estimator), ", ".join(links)]


def advantage_of(estimator: Estimator) -> str:
    parts = [first_sentence(estimator.spread)]
    if estimator.critic:
        parts = ["generalized advantages from a critic, below"]
    if estimator.whiten:
        parts.append("whitened over the step")
    if estimator.sequence_ratio:
        parts.append("with the sequence's ratio `w = exp(mean_t log(p_t / q_t))`")
    if estimator.policy_loss is not clipped_policy_loss:
        parts.append("with its own policy loss, below")
    if estimator.constant_weight:
        parts.append("with weights that divide by a constant, below")
    return ", ".join(parts)


def first_sentence(function: Callable) -> str:
    """The first sentence of the function's docstring, without its full stop."""
    lines = (function.__doc__ or "").splitlines() or [function.__name__]
    sentence = lines[0].split(". ")[0].removesuffix(".")
    return sentence[0].lower() + sentence[1:]


def family_table() -> str:
    head = ["family", "`model_type`", "what differs from a plain Llama"]
    rows = ([f.title, f"`{f.model_type}`", f.differs] for f in FAMILIES.values())
    return markdown([head, *rows])


def grader_table() -> str:
    return markdown([["`--rm-type`", "reward"], *([f"`{n}`", g.gives] for n, g in GRADERS.items())])


def rollout_hook_table() -> str:
    return hook_table(name for name in section_types() if name != "algorithm")


def trainer_hook_table() -> str:
    return hook_table(["algorithm"])


def hook_table(sections: Iterable[str]) -> str:
    """A row for each flag of these sections that takes a user's function."""
    rows = [["flag", "the function", "its signature"]]
    for section in sections:
        flags = flags_in(section_types()[section])
        for spec in filter(lambda spec: spec.hook, flags.values()):
            rows.append([f"`{spec.name}`", spec.help, f"`{spec.hook.shape}`"])
            for other, hook in (spec.hook_if or {}).items():
                asked = f"`{spec.name}` with `{flags[other].name}`"
                rows.append([asked, f"returns {hook.returns}", f"`{hook.shape}`"])
    return markdown(rows)


TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("algorithms.md", "estimator-list"): estimator_table,
    ("algorithms.md", "trainer-hooks"): trainer_hook_table,
    ("data-generation.md", "graders"): grader_table,
    ("data-generation.md", "hooks"): rollout_hook_table,
    ("models.md", "families"): family_table,
    ("architecture.md", "rooms"): picture,
}

if __name__ == "__main__":
    sys.exit(main())
