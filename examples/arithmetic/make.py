"""The example's prompts: `python -m examples.arithmetic.make FOLDER`.

The problems are sums and differences of numbers with two or three digits. Every prompt shows two
worked examples of its kind as earlier turns of the chat, so the model knows the form of a solution:

    What is 478 + 356?
    478 + 300 = 778
    778 + 50 = 828
    828 + 6 = 834
    Answer: 834

The second number is added or subtracted one digit at a time from the left, each digit on one line.

A training prompt may contain the beginning of the solution, up to any digit. So the model learns
the last lines before it gets the first lines right (a reverse curriculum, arXiv:2402.05808).
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

NUM_TRAIN = 6400  # 100 rollouts of 64 before a prompt repeats
NUM_EVAL = 256  # problems of two digits, and as many of three
SYSTEM = "Solve step by step."


@dataclass(frozen=True, slots=True)
class Problem:
    a: int
    sign: str  # "+" or "-"
    b: int

    @property
    def answer(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def num_digits(self) -> int:
        return len(str(self.a))

    def __str__(self) -> str:
        return f"{self.a} {self.sign} {self.b}"


EXAMPLES = {
    ("+", 2): (Problem(47, "+", 38), Problem(95, "+", 61)),
    ("-", 2): (Problem(82, "-", 35), Problem(97, "-", 41)),
    ("+", 3): (Problem(478, "+", 356), Problem(709, "+", 184)),
    ("-", 3): (Problem(624, "-", 251), Problem(873, "-", 648)),
}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    held_out: set[Problem] = set()
    for num_digits, name in ((2, "two"), (3, "three")):
        drawn = list(islice(problems(f"eval-{name}", num_digits, num_digits), NUM_EVAL))
        write_jsonl(folder / f"{name}_digits.jsonl", map(prompt, drawn))
        held_out.update(drawn)
    train = islice(problems("train", 2, 3, besides=held_out), NUM_TRAIN)
    rng = random.Random("lines")
    rows = (prompt(problem, rng.choice(beginnings(work(problem)))) for problem in train)
    write_jsonl(folder / "train.jsonl", rows)


def problems(
    purpose: str, fewest: int, most: int, besides: Iterable[Problem] = ()
) -> Iterator[Problem]:
    """Problems of `fewest` to `most` digits, without repeats and without negative differences.

    The examples and the problems in `besides` are left out. Each purpose has its own sequence.
    """
    rng = random.Random(purpose)
    seen = set(besides).union(*EXAMPLES.values())
    while True:
        problem = draw(rng, rng.randint(fewest, most))
        if problem not in seen:
            seen.add(problem)
            yield problem


def draw(rng: random.Random, num_digits: int) -> Problem:
    low, high = 10 ** (num_digits - 1), 10**num_digits - 1
    a, b, sign = rng.randint(low, high), rng.randint(low, high), rng.choice("+-")
    return Problem(a, "+", b) if sign == "+" else Problem(max(a, b), "-", min(a, b))


def beginnings(text: str) -> list[int]:
    """How many characters of the solution a prompt may contain.

    Either none, or all up to some digit before the last line. The model itself writes the answer.
    """
    lines, _ = text.rsplit("\n", 1)
    return [0, *(i for i, character in enumerate(lines, 1) if character.isdigit())]


def prompt(problem: Problem, num_given: int = 0) -> dict[str, Any]:
    """{"prompt": messages, "label": "834", "metadata": {"work": the correct continuation}}

    The first `num_given` characters of the solution start the assistant's turn.
    """
    messages = [{"role": "system", "content": SYSTEM}]
    for example in EXAMPLES[problem.sign, problem.num_digits]:
        messages.append({"role": "user", "content": f"What is {example}?"})
        messages.append({"role": "assistant", "content": work(example)})
    messages.append({"role": "user", "content": f"What is {problem}?"})
    whole = work(problem)
    given, rest = whole[:num_given], whole[num_given:]
    if given:
        messages.append({"role": "assistant", "content": given})
    return {"prompt": messages, "label": str(problem.answer), "metadata": {"work": rest}}


def work(problem: Problem) -> str:
    lines, total = [], problem.a
    for place in reversed(range(problem.num_digits)):
        change = Problem(total, problem.sign, problem.b // 10**place % 10 * 10**place)
        total = change.answer
        lines.append(f"{change} = {total}")
    return "\n".join([*lines, f"Answer: {total}"])


if __name__ == "__main__":
    main()
