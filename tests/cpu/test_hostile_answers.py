"""Answers written to block a grader, against real grader processes."""

from __future__ import annotations

from tests.unit.test_grading import finished, grade, make_args
from vime.data.sample_metrics import of_samples
from vime.rollout.failures import Failure, kind_of
from vime.rollout.metrics import timed_out
from vime.types import Status

HOSTILE = {
    "power tower": "9^{9^{9^{9}}}",
    "nest of braces": "{" * 100_000,
    "nest of fractions": r"\frac{1}{" * 20_000 + "x" + "}" * 20_000,
    "nest of parentheses": "(" * 50_000 + "x" + ")" * 50_000,
    "endless simplification": "+".join(rf"\sin(x^{{{i}}})^{{{97 - i}}}" for i in range(1, 60)),
    "factorial of a factorial": "((9!)!)!",
}
# Too long for an answer, so they are wrong. The others would keep a grader busy for years.
WRONG = ("nest of braces", "nest of fractions", "nest of parentheses")


def test_hostile_answers_time_out_and_block_no_other_answer():
    """A group that alternates hostile and honest answers. The honest ones keep their rewards."""
    honest = {"rm_type": "deepscaler"}
    group = []
    for i, (name, answer) in enumerate(HOSTILE.items()):
        metadata = {"rm_type": "math" if i % 2 else "deepscaler"}
        response = rf"</think>\boxed{{{answer}}}"
        group.append(finished(response, r"\sqrt{2}x", 2 * i, metadata={**metadata, "name": name}))
        right = r"</think>\boxed{\sqrt{8}}"
        group.append(finished(right, r"2\sqrt{2}", 2 * i + 1, metadata=dict(honest)))
    grade(make_args(rm_type="math", timeout_s=5.0, workers=2), *group)
    bad, good = group[::2], group[1::2]
    assert [s.reward for s in good] == [1.0] * len(good)
    for sample in bad:
        if sample.metadata["name"] in WRONG:
            assert (sample.status, sample.reward) == (Status.COMPLETED, 0.0)
        else:
            assert (sample.status, sample.reward) == (Status.FAILED, None)
            assert kind_of(sample) is Failure.GRADING_TIMEOUT
    assert sum(map(timed_out, group)) == len(HOSTILE) - len(WRONG)
    counted = of_samples(group, needs_reward=True)
    assert counted["rollout/failed_samples"] == len(HOSTILE) - len(WRONG)
