"""The example's prompts: `python -m examples.arithmetic.make FOLDER`.

Sums and differences of two- and of three-digit numbers. Every prompt holds the same worked
examples as earlier turns of the chat, so that the model knows the form of the work:

    478+356
    478+300=778
    778+50=828
    828+6=834
    Answer: 834

The second number is added, or taken away, one digit at a time from the left: every line changes
one number by one digit, and a tokenizer that splits numbers into digits, as SmolLM2's does, copies
what stays. Nothing in the data shows how the asked problem is worked: that is learned from the
reward.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from scripts.quickstart.data import write_jsonl

NUM_TRAIN = 6400  # 100 rollouts of 64 before one comes again
NUM_EVAL = 256  # of two digits, and of three
SYSTEM = "Work step by step, as in the examples."


@dataclass(frozen=True, slots=True)
class Problem:
    a: int
    sign: str  # "+" or "-"
    b: int

    @property
    def question(self) -> str:
        return f"{self.a}{self.sign}{self.b}"

    @property
    def answer(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def num_digits(self) -> int:
        return len(str(self.a))


EXAMPLES = (
    Problem(47, "+", 38),
    Problem(624, "-", 251),
    Problem(478, "+", 356),
    Problem(82, "-", 35),
)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    held_out: set[Problem] = set()
    for num_digits, name in ((2, "two"), (3, "three")):
        drawn = list(islice(problems(f"eval-{name}", num_digits, num_digits), NUM_EVAL))
        write_jsonl(folder / f"{name}_digits.jsonl", map(prompt, drawn))
        held_out.update(drawn)
    train = islice(problems("train", 2, 3, besides=held_out), NUM_TRAIN)
    write_jsonl(folder / "train.jsonl", map(prompt, train))


def problems(
    purpose: str, fewest: int, most: int, besides: Iterable[Problem] = ()
) -> Iterator[Problem]:
    """Problems of `fewest` to `most` digits without repeats, the examples and those in `besides`
    left out; a sequence of its own for each purpose. No difference is below 0."""
    rng = random.Random(purpose)
    seen = {*besides, *EXAMPLES}
    while True:
        problem = draw(rng, rng.randint(fewest, most))
        if problem not in seen:
            seen.add(problem)
            yield problem


def draw(rng: random.Random, num_digits: int) -> Problem:
    low, high = 10 ** (num_digits - 1), 10**num_digits - 1
    a, b, sign = rng.randint(low, high), rng.randint(low, high), rng.choice("+-")
    return Problem(a, "+", b) if sign == "+" else Problem(max(a, b), "-", min(a, b))


def prompt(problem: Problem) -> dict[str, Any]:
    """{"prompt": messages, "label": "834"}"""
    messages = [said("system", SYSTEM)]
    for example in EXAMPLES:
        messages += [said("user", example.question), said("assistant", work(example))]
    messages.append(said("user", problem.question))
    return {"prompt": messages, "label": str(problem.answer)}


def work(problem: Problem) -> str:
    lines, total = [], problem.a
    for place in reversed(range(problem.num_digits)):
        change = Problem(total, problem.sign, problem.b // 10**place % 10 * 10**place)
        total = change.answer
        lines.append(f"{change.question}={total}")
    return "\n".join([*lines, f"Answer: {total}"])


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


if __name__ == "__main__":
    main()
