"""The letter that a response gives, and rows that have no right letter."""

import json
from functools import partial

import pytest

from tests.unit.fake_engine import make_config
from vime.data.checks import data_problems
from vime.rollout.rm_hub import gpqa
from vime.rollout.rm_hub.grader import GradingFailed

CHOICES = ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"so \boxed{B}", "B"),
        ("The answer is (B).", "B"),
        ("<think>A</think> Answer: **B**", "B"),
        ("The answer is C", "C"),
        ("no idea", None),
        ("", None),
        ("The answer is a bit subtle, but I pick C.", "C"),
        ("The answer is a.", "A"),
        (r"\boxed{\textbf{C}}", "C"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{\mathrm{C}}", "C"),
        (r"\boxed{C.}", "C"),
        (r"\boxed{\text{C. three}}", "C"),
        (r"The answer is \(C\)", "C"),
        (r"\(C\)", "C"),
        ("The answer is $C$", "C"),
        ("Answer:\nC", "C"),
        ("Answer: c\nas shown above", "C"),
        ("The correct answer is option C", "C"),
        ("Option C is right; a bit odd", "C"),
        ("A is wrong, so C", "C"),
        ("I'd go with C. I am sure.", "C"),
        ("C. A bit of luck.", "C"),
        ("B or D? A is right", "A"),
    ],
)
def test_gpqa_reads_the_letter(response, letter):
    rights = {
        right: gpqa.grade(response, None, {"choices": CHOICES, "correct_letter": right})
        for right in "ABCD"
    }
    assert rights == {right: float(right == letter) for right in "ABCD"}


def test_the_right_letter_is_the_metadatas_or_the_label_or_the_choice_that_is_the_label():
    grade = partial(gpqa.grade, "The answer is B")
    assert grade("two", {"choices": CHOICES}) == 1.0
    assert grade("two", {"choices": dict(zip("ABCD", CHOICES, strict=True))}) == 1.0
    assert grade("b", {}) == grade("(B)", {}) == 1.0
    assert grade("C", {"correct_letter": "B"}) == 1.0
    assert grade("C", {}) == 0.0


@pytest.mark.parametrize(
    ("label", "metadata", "words"),
    [
        ("five", {"choices": CHOICES}, "the label 'five' is neither a letter nor the text"),
        (None, {}, "the label None is neither"),
        ("E", {"choices": CHOICES}, "the right letter E is not among the 4 choices"),
        ("A", {"correct_letter": 2}, "must be a letter, not 2"),
        ("A", {"choices": 4}, "must be a list or"),
    ],
)
def test_a_row_without_a_right_letter_is_refused_before_the_run(tmp_path, label, metadata, words):
    with pytest.raises(GradingFailed, match=words):
        gpqa.grade("B", label, metadata)
    file = tmp_path / "rows.jsonl"
    rows = [("two", {"choices": CHOICES}), (label, metadata)]
    file.write_text(
        "".join(json.dumps({"input": "q", "label": a, "metadata": m}) + "\n" for a, m in rows)
    )

    def problems(**reward):
        data = {"prompt_data": str(file), "label_key": "label"}
        return list(data_problems(make_config("none", data=data, reward=reward)))

    (problem,) = problems(rm_type="gpqa")
    assert problem.startswith(f"--prompt-data {file} line 2: ")
    assert words in problem
    assert problems(rm_type="f1") == problems(custom_rm_path="mine.grade") == []
