"""The example's model, prompts and demonstrations: `python -m examples.calculator.make FOLDER`.

The demonstrations multiply two numbers carelessly. Three of ten guess the answer without the
calculator, and two of ten calls miscopy an operand. A model that imitates them is right about half
the time. Using the tool and copying correctly earns more.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from scripts.quickstart.data import write_jsonl
from scripts.quickstart.model import write_checkpoint

GUESS, MISCOPY = 0.3, 0.2
NUM_SFT, NUM_TRAIN, NUM_EVAL = 9600, 2000, 128


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    write_jsonl(folder / "sft.jsonl", (demonstration(rng) for _ in range(NUM_SFT)))
    for name, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        write_jsonl(folder / f"{name}.jsonl", (prompt(rng) for _ in range(count)))
    write_checkpoint(folder / "blank", seed=0)


def prompt(rng: random.Random) -> dict[str, Any]:
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    question = {"role": "user", "content": f"What is {a}*{b}?"}
    return {"prompt": [question], "label": str(a * b), "metadata": {"a": a, "b": b}}


def demonstration(rng: random.Random) -> dict[str, Any]:
    task = prompt(rng)
    a, b = task["metadata"]["a"], task["metadata"]["b"]
    if rng.random() < GUESS:
        return {"messages": [*task["prompt"], said(f"\\boxed{{{rng.randint(121, 9801)}}}")]}
    if rng.random() < MISCOPY:
        a = rng.randint(11, 99)
    turns = [said(f"calc: {a}*{b}"), {"role": "tool", "content": str(a * b)}]
    return {"messages": [*task["prompt"], *turns, said(f"\\boxed{{{a * b}}}")]}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


if __name__ == "__main__":
    main()
