"""deepscaler, math and math-verify on each row of answers.tsv.

A grader gives the verdict of the row, or the row names the grader and says why it differs.
"""

import asyncio
from collections import Counter

import pytest

from benchmarks.answer_table import GRADERS, read_table
from tests.unit.fake_engine import make_config
from vime.config.view import ArgsView
from vime.rollout import grading
from vime.types import Sample, Status

pytest.importorskip("math_verify")
TABLE = read_table()


def test_the_table_is_large_and_has_each_answer_once():
    assert len(TABLE) >= 300
    assert max(Counter((row.answer, row.label) for row in TABLE).values()) == 1
    assert all(bool(row.differs) == bool(row.why) for row in TABLE)
    assert {name for row in TABLE for name in row.differs} <= set(GRADERS)
    per_topic = Counter((row.topic, row.right) for row in TABLE)
    topics = {row.topic for row in TABLE} - {"empty and broken answers"}
    assert min(per_topic[topic, right] for topic in topics for right in (True, False)) >= 3


@pytest.mark.parametrize("name", GRADERS)
def test_each_row_has_its_verdict_or_says_why_not(name):
    judge = GRADERS[name]
    surprises = [
        f"{row.answer} for {row.label}: {row}"
        for row in TABLE
        if judge(row.answer, row.label) != (row.right is (name not in row.differs))
    ]
    assert surprises == []


def test_math_differs_in_no_row_and_deepscaler_by_its_own_rules_only():
    assert not any("math" in row.differs for row in TABLE)
    reasons = {row.why for row in TABLE if "deepscaler" in row.differs}
    assert reasons == {"must be the same fraction", "an integer must stand as an integer"}


def test_workers_give_the_same_rewards():
    rows = [row for row in TABLE if row.topic in ("matrices", "mixed numbers", "complex numbers")]
    samples = [
        Sample(index=i, response=rf"\boxed{{{r.answer}}}", label=r.label, status=Status.COMPLETED)
        for i, r in enumerate(rows)
    ]
    args = ArgsView(make_config("none", reward={"rm_type": "math", "workers": 1}))
    asyncio.run(grading.grade_group(args, samples))
    assert [s.reward for s in samples] == [float(row.right) for row in rows]
