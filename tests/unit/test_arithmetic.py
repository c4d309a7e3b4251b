"""The arithmetic example's prompts and reward, and the benchmark's reading of its curve."""

import asyncio
import json

import pytest

from benchmarks.learn_arithmetic import curve_of, summary
from examples.arithmetic import make
from examples.arithmetic.make import EXAMPLES, Problem, prompt, work
from examples.arithmetic.reward import reward
from vime.types import Sample, Status


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["make", str(folder)])
        make.main()
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
    }


def question(row: dict) -> str:
    return row["prompt"][-1]["content"]


def test_held_out_problems_are_not_among_the_prompts_or_the_examples(files):
    train, two, three = (
        {question(r) for r in files[n]} for n in ("train", "two_digits", "three_digits")
    )
    assert (len(train), len(two), len(three)) == (make.NUM_TRAIN, make.NUM_EVAL, make.NUM_EVAL)
    assert not train & (two | three)
    assert not (train | two | three) & {e.question for e in EXAMPLES}


def test_every_label_is_the_answer_and_none_is_below_0(files):
    for row in [row for rows in files.values() for row in rows]:
        assert int(row["label"]) == eval(question(row)) >= 0


def test_digits_and_signs_come_in_even_shares(files):
    for name, share in (("train", 0.5), ("two_digits", 1), ("three_digits", 0)):
        rows = files[name]
        two = sum(len(question(r).replace("-", "+").split("+")[0]) == 2 for r in rows)
        plus = sum("+" in question(r) for r in rows)
        assert two / len(rows) == pytest.approx(share, abs=0.05)
        assert plus / len(rows) == pytest.approx(0.5, abs=0.1)


def test_the_examples_are_worked_as_the_page_says():
    assert work(Problem(478, "+", 356)).splitlines() == [
        "478+300=778",
        "778+50=828",
        "828+6=834",
        "Answer: 834",
    ]
    assert work(Problem(82, "-", 35)) == "82-30=52\n52-5=47\nAnswer: 47"
    assert prompt(Problem(12, "+", 34))["prompt"][-1] == {"role": "user", "content": "12+34"}


@pytest.mark.parametrize(
    ("response", "status", "value"),
    [
        ("47+30=77\nAnswer: 85<|im_end|>", Status.COMPLETED, 1),
        ("Answer: 85", Status.COMPLETED, 1),
        ("47+30=77\nAnswer: 85<|im_end|>", Status.TRUNCATED, 0),
        ("Answer: 85\n12+3=15\nAnswer: 15<|im_end|>", Status.COMPLETED, 0),
        ("Answer: 15\nAnswer: 85<|im_end|>", Status.COMPLETED, 1),
        ("Answer: 850<|im_end|>", Status.COMPLETED, 0),
        ("85<|im_end|>", Status.COMPLETED, 0),
    ],
)
def test_the_reward_is_for_the_last_line_of_an_answer_that_ends(response, status, value):
    sample = Sample(response=response, label="85", status=status)
    assert asyncio.run(reward(None, sample)) == value


def test_the_target_is_met_at_the_first_evaluation_that_reaches_it():
    def evaluated(step: int, time: float, two: float, three: float) -> dict:
        rates = {"two_digits": two, "three_digits": three}
        tokens = {f"eval/{name}-response_len": 30.0 for name in rates}
        return {"step": step, "time": time, **{f"eval/{n}": r for n, r in rates.items()}, **tokens}

    records = [
        evaluated(0, 130.0, 0.25, 0.125),
        {"step": 1, "time": 140.0},
        evaluated(10, 220.0, 1.0, 0.75),
        evaluated(20, 280.0, 0.75, 0.75),
    ]
    found = summary(curve_of(records, began=100.0))
    assert (found["start"], found["value"], found["rollouts_to_target"]) == (0.1875, 0.75, 10)
    assert (found["seconds_to_target"], found["seconds"]) == (120, 180)
