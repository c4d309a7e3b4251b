"""The prompts and reward of the arithmetic example, and the learning curve of its benchmark."""

import asyncio
import json
from collections import Counter
from functools import partial

import pytest

from benchmarks.learn_arithmetic import curve_of, summary
from examples.arithmetic import make
from examples.arithmetic.make import EXAMPLES, Problem, prompt, work
from examples.arithmetic.reward import compare_tokens, grade, token_advantages
from tests.unit.fake_engine import ids_of, make_config
from vime.config.view import ArgsView
from vime.data.batching import build_train_batch
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
    asked = [m["content"] for m in row["prompt"] if m["role"] == "user"]
    return asked[-1].removeprefix("What is ").removesuffix("?")


def given(row: dict) -> str:
    last = row["prompt"][-1]
    return last["content"] if last["role"] == "assistant" else ""


def work_of(row: dict) -> str:
    return given(row) + row["metadata"]["work"]


def test_held_out_problems_are_in_neither_the_prompts_nor_the_examples(files):
    train, two, three = (
        {question(r) for r in files[n]} for n in ("train", "two_digits", "three_digits")
    )
    assert (len(train), len(two), len(three)) == (make.NUM_TRAIN, make.NUM_EVAL, make.NUM_EVAL)
    assert not train & (two | three)
    assert not (train | two | three) & {str(e) for examples in EXAMPLES.values() for e in examples}


def test_every_label_is_the_right_answer_and_none_is_negative(files):
    for row in [row for rows in files.values() for row in rows]:
        assert int(row["label"]) == eval(question(row)) >= 0
        *lines, answer = work_of(row).splitlines()
        assert answer == f"Answer: {row['label']}"
        assert len(lines) in (2, 3)
        assert all(eval(line.replace("=", "==")) for line in lines)


def test_training_prompts_stop_after_any_digit_and_held_out_prompts_before_the_first(files):
    twos = [row for row in files["train"] if len(question(row).split()[0]) == 2]
    ends = Counter(len(given(row)) for row in twos if len(work_of(row)) == len(WORK))
    assert set(ends) == {0, 1, 2, 6, 7, 11, 12, 14, 15, 19, 23, 24}
    assert max(ends.values()) < 2 * min(ends.values())
    for row in files["train"]:
        assert given(row) == "" or given(row)[-1].isdigit()
        assert row["metadata"]["work"].endswith(f"\nAnswer: {row['label']}")
    assert not any(given(row) for name in ("two_digits", "three_digits") for row in files[name])


def test_digits_and_signs_are_evenly_distributed(files):
    for name, share in (("train", 0.5), ("two_digits", 1), ("three_digits", 0)):
        rows = files[name]
        two = sum(len(question(r).split()[0]) == 2 for r in rows)
        plus = sum("+" in question(r) for r in rows)
        assert two / len(rows) == pytest.approx(share, abs=0.05)
        assert plus / len(rows) == pytest.approx(0.5, abs=0.1)


def test_a_prompt_shows_two_worked_problems_of_its_kind():
    messages = prompt(Problem(123, "+", 456))["prompt"]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert [m["content"] for m in messages[1:]] == [
        "What is 478 + 356?",
        "478 + 300 = 778\n778 + 50 = 828\n828 + 6 = 834\nAnswer: 834",
        "What is 709 + 184?",
        "709 + 100 = 809\n809 + 80 = 889\n889 + 4 = 893\nAnswer: 893",
        "What is 123 + 456?",
    ]
    assert work(Problem(82, "-", 35)) == "82 - 30 = 52\n52 - 5 = 47\nAnswer: 47"


WORK = "47 + 30 = 77\n77 + 8 = 85\nAnswer: 85"  # 35 characters


@pytest.mark.parametrize(
    ("response", "status", "reward"),
    [
        (WORK + "<|im_end|>", Status.COMPLETED, 1),
        ("Answer: 85", Status.COMPLETED, 1),
        ("12 + 3 = 15\nAnswer: 15\nAnswer: 85<|im_end|>", Status.COMPLETED, 1),
        (WORK, Status.TRUNCATED, 0),
        (WORK + "\nAnswer: 15<|im_end|>", Status.COMPLETED, 0),
        (WORK + "0<|im_end|>", Status.COMPLETED, 0),
        ("47 + 38 = 85<|im_end|>", Status.COMPLETED, 0),
        ("Well: 85<|im_end|>", Status.COMPLETED, 0),
    ],
)
def test_an_answer_is_right_or_wrong(response, status, reward):
    sample = Sample(response=response, label="85", status=status)
    assert asyncio.run(grade(None, sample)) == reward


def trained_on(hf, *groups):
    """(sequences, advantages) that a trainer rank gets from groups of (response, reward).

    The tokenizer in `hf` has one token per character, and <|im_end|> is one token.
    """
    algorithm = {"advantage_estimator": "maxrl", "per_token_loss": True}
    cfg = make_config(hf, batch={"prompts": len(groups)}, algorithm=algorithm)
    args = ArgsView(cfg)
    samples = [
        [
            Sample(
                group_index=g,
                index=10 * g + i,
                tokens=[*ids_of("Q"), *ids_of(response), *([2] if reward is not None else [])],
                response_length=len(response) + (reward is not None),
                rollout_log_probs=[-1.0] * (len(response) + (reward is not None)),
                status=Status.TRUNCATED if reward is None else Status.COMPLETED,
                reward=reward or 0.0,
                metadata={"work": "1 + 2 = 3"},
            )
            for i, (response, reward) in enumerate(group)
        ]
        for g, group in enumerate(groups)
    ]
    batch = build_train_batch(samples, cfg, 0, post_process=partial(compare_tokens, args))
    return batch.sequences, token_advantages(args, list(batch.sequences), None, None)


def test_a_token_is_compared_with_tokens_after_the_same_prefix(hf):
    """Two right samples and one that is wrong at its 9th token. Its 10th token is ignored."""
    (right, _, wrong, other), advantages = trained_on(
        hf, [("1 + 2 = 3", 1.0), ("1 + 2 = 3", 1.0), ("1 + 2 = 43", 0.0)], [("3", 1.0)]
    )
    mean = 2 / 3
    assert right.loss_mask.tolist() == [1] * 10
    assert wrong.loss_mask.tolist() == [1] * 9 + [0, 0]
    assert advantages[0].tolist() == pytest.approx([0] * 8 + [(1 - mean) / mean, 0])
    assert advantages[2].tolist() == pytest.approx([0] * 8 + [-1, 0, 0])
    assert other.loss_mask.tolist() == [1, 1]
    assert advantages[3].tolist() == [0, 0]
    assert (right.raw_reward, wrong.raw_reward) == (1, 0)


def test_another_way_to_a_right_answer_is_not_a_mistake(hf):
    _, advantages = trained_on(hf, [("1 + 2 = 3", 1.0), ("2 + 1 = 3", 1.0), ("2 + 4", 0.0)])
    mean = 2 / 3  # two of the three start right, and then differ
    assert advantages[0].tolist() == pytest.approx([(1 - mean) / mean] + [0] * 9)
    assert advantages[1].tolist() == pytest.approx([(1 - mean) / mean] + [0] * 9)
    assert advantages[2].tolist() == pytest.approx([-1, 0, 0, 0, 0, 0])


def test_a_group_with_the_same_wrong_answer_has_nothing_to_compare(hf):
    _, advantages = trained_on(hf, [("1 + 2 = 4", 0.0)] * 2)
    assert advantages[0].tolist() == [0] * 10


def test_a_response_cut_before_any_mistake_has_no_mistake(hf):
    (cut, _), advantages = trained_on(hf, [("1 + 2", None), ("2", 0.0)])
    assert cut.loss_mask.tolist() == [1] * 5
    assert advantages[0].tolist() == pytest.approx([1, 0, 0, 0, 0])
    assert advantages[1].tolist() == pytest.approx([-1, 0])


def test_the_target_counts_as_met_at_the_first_evaluation_that_reaches_it():
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
