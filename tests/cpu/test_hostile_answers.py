"""Answers made to stop a grader, against real grader processes."""

from __future__ import annotations

import time

from tests.unit.test_grading import finished, grade, make_args
from vime.rollout import grading, metrics
from vime.types import Status

HOSTILE = {
    "power tower": "9^{9^{9^{9}}}",
    "nest of braces": "{" * 100_000,
    "nest of fractions": r"\frac{1}{" * 20_000 + "x" + "}" * 20_000,
    "nest of parentheses": "(" * 50_000 + "x" + ")" * 50_000,
    "endless simplification": "+".join(rf"\sin(x^{{{i}}})^{{{97 - i}}}" for i in range(1, 60)),
    "factorial of a factorial": "((9!)!)!",
}


def test_hostile_answers_cost_their_deadline_and_stop_nothing():
    """A whole group of them with honest answers between: those keep their rewards."""
    honest = {"rm_type": "deepscaler"}
    group = []
    for i, (name, answer) in enumerate(HOSTILE.items()):
        metadata = {"rm_type": "math" if i % 2 else "deepscaler"}
        response = rf"</think>\boxed{{{answer}}}"
        group.append(finished(response, r"\sqrt{2}x", 2 * i, metadata={**metadata, "name": name}))
        right = r"</think>\boxed{\sqrt{8}}"
        group.append(finished(right, r"2\sqrt{2}", 2 * i + 1, metadata=dict(honest)))
    args = make_args(rm_type="math", timeout_s=2.0, workers=2)
    started = time.monotonic()
    grade(args, *group)
    took = time.monotonic() - started
    bad, good = group[::2], group[1::2]
    assert [s.reward for s in good] == [1.0] * len(good)
    for sample in bad:  # judged wrong in time, or failed with the reason; never right
        assert sample.reward == 0.0 or (sample.status is Status.FAILED and sample.failure)
    counted = metrics.failures(group)
    timeouts = [s for s in bad if (s.failure or "").startswith(grading.TIMEOUT)]
    assert counted["rollout/grading_timeouts"] == len(timeouts) >= 1
    assert counted["rollout/failed_samples"] == sum(s.status is Status.FAILED for s in bad)
    assert took < 60 + 2.0 * len(bad)  # starting grader processes included
