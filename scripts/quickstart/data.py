"""The JSONL files: labelled prompts for training and evaluation, and demonstrations."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from scripts.quickstart.task import Problem, draw_problem, solve

NUM_EVAL = 256
NUM_TRAIN = 6400  # 200 rollouts of 32 before a prompt repeats
NUM_SFT = 12800  # 400 steps of 32


def write_data(folder: Path, seed: int) -> None:
    """train.jsonl and eval.jsonl ({"prompt": messages, "label": "834"}), sft.jsonl ({"messages"}).

    The held-out problems of eval.jsonl are in neither of the other files.
    """
    held_out = list(islice(problems(seed, "eval"), NUM_EVAL))
    train = islice(problems(seed, "train", excluded=held_out), NUM_TRAIN)
    sft = islice(problems(seed, "sft", excluded=held_out), NUM_SFT)
    pupil = random.Random(f"{seed}-pupil")
    write_jsonl(folder / "eval.jsonl", map(with_label, held_out))
    write_jsonl(folder / "train.jsonl", map(with_label, train))
    write_jsonl(folder / "sft.jsonl", (with_demonstration(p, pupil) for p in sft))


def problems(seed: int, purpose: str, excluded: Iterable[Problem] = ()) -> Iterator[Problem]:
    """Problems without repeats. Each pair of seed and purpose has its own sequence."""
    rng = random.Random(f"{seed}-{purpose}")
    seen = set(excluded)
    while True:
        problem = draw_problem(rng)
        if problem not in seen:
            seen.add(problem)
            yield problem


def with_label(problem: Problem) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": problem.question}], "label": problem.label}


def with_demonstration(problem: Problem, pupil: random.Random) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": solve(problem, pupil)},
        ]
    }


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
