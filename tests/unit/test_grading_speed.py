"""Every grader takes a text of 100,000 characters, of any kind, in time linear in its length."""

import time
from functools import partial

import pytest

from vime.rollout.grading import without_end_mark
from vime.rollout.rm_hub.ifeval_checks import CHECKS
from vime.rollout.rm_hub.registry import GRADERS

pytest.importorskip("math_verify")  # imported here, because its import takes a second
LENGTH = 100_000
LIMIT_S = 1.0  # CPU time; the slowest takes a tenth of it on a slow machine
PIECES = [
    *" \t\n\r\v\f\u00a0\u2003", *"()[]{}<>|", *"\\$*#-+_.,:;!?'\"`^~%&=/@", *"0aA", "\u2022",
    "answer is ", "Answer: ", "the answer is (", r"\boxed{", r"\boxed{}", r"\text{", r"\text{ ",
    r"\frac{", r"\frac{1}", "- ", "* ", "** ", "***", "******", "<<", ">>", "[a", "\n- ", "\n*\n",
    " \n", ". ", ".'", "1 ", "1,", "100 ", "1/", r"\,", r"\ ", "</think>", "<|", "<|im_end|>",
    "[EOS]", "option ", "A ", "A B", "p.s", "SECTION ", "Mr. ", " and ", "e", "1e", "x=", ",x=",
]  # fmt: skip
PARAMETERS = {
    "keywords": ["a b"], "keyword": "a b", "frequency": 3, "relation": "at least",
    "forbidden_words": ["a b", " "], "letter": "a", "let_frequency": 3, "let_relation": "at least",
    "num_sentences": 3, "num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a", "num_words": 3,
    "num_placeholders": 3, "postscript_marker": "P.S.", "num_bullets": 3, "num_highlights": 3,
    "section_spliter": "SECTION", "num_sections": 3, "prompt_to_repeat": "a", "end_phrase": "a",
    "capital_frequency": 3, "capital_relation": "at least",
}  # fmt: skip


def texts(piece: str):
    long = (piece * LENGTH)[:LENGTH]
    yield long + "x"
    yield rf"</think> Answer: \boxed{{{long}}}"


def in_time(work, what: str) -> None:
    spent = []
    for _ in range(3):  # the best of three, so that a pause of the process does not count
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
        if spent[-1] < LIMIT_S:
            return
    pytest.fail(f"{what}: {min(spent):.1f} s")


@pytest.mark.parametrize("name", [n for n, grader in GRADERS.items() if not grader.takes_sample])
def test_a_grader_reads_100_000_characters_of_any_kind_within_a_second(name):
    metadata = {"choices": ["one", "two", "three"], "correct_letter": "B"}
    metadata |= {"instruction_id_list": ["startend:quotation"]}
    for piece in PIECES:
        for text in texts(piece):
            in_time(partial(GRADERS[name].grade, text, "7", metadata), repr(piece))


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_of_ifeval_reads_100_000_characters_of_any_kind_within_a_second(check):
    wanted = CHECKS[check].__code__.co_varnames[1 : CHECKS[check].__code__.co_argcount]
    given = {name: PARAMETERS[name] for name in wanted}
    for piece in PIECES:
        text = (piece * LENGTH)[:LENGTH]
        in_time(partial(CHECKS[check], text, **given), repr(piece))


def test_end_marks_are_found_in_100_000_characters_of_any_kind_within_a_second():
    for piece in PIECES:
        for text in texts(piece):
            in_time(partial(without_end_mark, text), repr(piece))


@pytest.mark.parametrize("name", ["deepscaler", "math", "dapo", "gpqa", "f1"])
def test_the_part_in_the_rollouts_process_reads_a_full_box_within_a_second(name):
    """The longest box that is an answer, which algebra in a worker may still judge."""
    for piece in PIECES:
        text = rf"</think> Answer: \boxed{{{(piece * 4900)[:4900]}}}"
        label = "B" if name == "gpqa" else text
        in_time(partial(GRADERS[name].quick, text, label, {}), repr(piece))
