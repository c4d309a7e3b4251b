"""The task: three-digit addition, written out from the units by a careless pupil.

    What is 478+356?
    8+6+0=14
    7+5+1=13
    4+3+1=8
    \\boxed{834}

The demonstrations are wrong 60% of the time, on purpose. The pupil forgets a carry with probability
0.7, and a column's sum is off by one with probability 0.05. The boxed number follows from these
lines. A model that imitates the pupil is right about 40% of the time at best. The label is the true
sum, so a verifier can tell good work from bad: everything that RL adds beyond 40% comes from the
verifier.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NUM_DIGITS = 3
FORGET_CARRY = 0.7  # probability, at each column whose sum has a carry
SLIP = 0.05  # probability that a column's sum is off by one
SHARE_RIGHT = 0.40  # follows from the two probabilities; a test measures it


@dataclass(frozen=True, slots=True)
class Problem:
    a: int
    b: int

    @property
    def question(self) -> str:
        return f"What is {self.a}+{self.b}?"

    @property
    def label(self) -> str:
        return str(self.a + self.b)


def draw_problem(rng: random.Random) -> Problem:
    low, high = 10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS - 1
    return Problem(rng.randint(low, high), rng.randint(low, high))


def solve(
    problem: Problem,
    rng: random.Random,
    *,
    forget_carry: float = FORGET_CARRY,
    slip: float = SLIP,
) -> str:
    """The pupil's work: a line for each column, then the boxed answer."""
    lines, carry, answer = [], 0, ""
    for column in range(NUM_DIGITS):
        x, y = problem.a // 10**column % 10, problem.b // 10**column % 10
        total = x + y + carry
        if rng.random() < slip:
            total = max(0, total + rng.choice((-1, 1)))
        lines.append(f"{x}+{y}+{carry}={total}")
        last = column == NUM_DIGITS - 1
        answer = (str(total) if last else str(total % 10)) + answer
        carry = total // 10 if rng.random() >= forget_carry else 0
    return "\n".join(lines) + f"\n\\boxed{{{answer}}}"


def boxed(work: str) -> str:
    """The boxed answer at the end of the work."""
    return work.rpartition("\\boxed{")[2].rstrip("}")
