import asyncio

import pytest

from tests.unit.fake_engine import make_config
from vime.config.view import ArgsView
from vime.rollout import grading
from vime.rollout.rm_hub import ifeval
from vime.rollout.rm_hub.grader import GradingFailed
from vime.rollout.rm_hub.ifeval_checks import CHECKS
from vime.types import Sample, Status

LIST = "* one\n* two\n- three"
INSTRUCTIONS = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A category, a Dog.", "A cat, a do g."),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a b a", "a"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a", "a a"),
    ("keywords:forbidden_words", {"forbidden_words": ["no"]}, "know", "No!"),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 2, "let_relation": "at least"},
        "tree",
        "the",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "One is 1.5 long. Two!",
        "A. B. C.",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b's c", "a b"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen, more.",
        "First.\n\nMore.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b c]", "[a] [b\nc]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x\np.s. y", "x PS y"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, LIST, LIST + "\n* four"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", "*a* b*"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<<>> text"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why?"}, "why? Because.", "Because."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why?"}, "\n Why? Because.", "So. Why?"),
    ("startend:end_checker", {"end_phrase": "The end."}, "x the end.", "The end. x"),
    ("startend:quotation", {}, '"quoted"', 'not "quoted"'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA and ESA",
        "NASA and i",
    ),
    ("change_case:english_capital", {}, "ALL 3.", "All 3."),
    ("change_case:english_lowercase", {}, "all 3.", "All 3."),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]


@pytest.mark.parametrize(
    ("name", "given", "right", "wrong"), INSTRUCTIONS, ids=[case[0] for case in INSTRUCTIONS]
)
def test_an_instruction_is_followed_or_not(name, given, right, wrong):
    metadata = {"instruction_id_list": [name], "kwargs": [{**given, "unused": None}]}
    assert ifeval.grade(right, None, metadata) == 1.0
    assert ifeval.grade(wrong, None, metadata) == 0.0


# (instruction, parameters, text, whether the public benchmark counts it as followed)
FINE_POINTS = [
    ("keywords:frequency", {"keyword": "an", "frequency": 2, "relation": "at least"}, "banana", 1),
    ("keywords:forbidden_words", {"forbidden_words": ["no"]}, "no-one", 0),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "it's so", 1),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***a *** b***", 1),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a *** *** b", 0),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'First.\n\n"Then!',
        1,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\n**Then** go",
        0,
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"},
     "Dr. Fox met Mr. Hare.", 1),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[] [[a] b]", 1),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "so, p. s. go", 1),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S. go", 1),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.S. go", 0),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "+ a\n- b\n\u2022 c", 1),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "**a**\n*b\n-c", 1),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "** ** * *", 0),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "**a b**", 1),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 1},
     "SECTION 1", 0),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "a Section 1: b, Section2", 1),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 1},
     "Section one", 0),
    ("detectable_format:json_format", {}, "```\n[1]\n```", 1),
    ("detectable_format:json_format", {}, "Here: [1]", 0),
    ("detectable_format:title", {}, "a <<b>> c", 1),
    ("detectable_format:title", {}, "<<a\nb>>", 0),
    ("combination:two_responses", {}, "******a******b******", 1),
    ("combination:two_responses", {}, "a******b******c", 0),
    ("startend:end_checker", {"end_phrase": "the end"}, 'It is "The End"', 1),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 3, "capital_relation": "at least"}, "I, A and U.S.", 1),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 3, "capital_relation": "less than"}, "A-B and Abc", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "text", "followed"), FINE_POINTS)
def test_fine_points_are_judged_as_in_the_public_benchmark(name, given, text, followed):
    metadata = {"instruction_id_list": [name], "kwargs": [given]}
    assert ifeval.grade(text, None, metadata) == followed


def test_every_instruction_has_an_example_and_a_response_must_follow_all():
    assert {case[0] for case in INSTRUCTIONS} == set(CHECKS)
    both = ["punctuation:no_comma", "change_case:english_lowercase"]
    metadata = {"instruction_id_list": both}
    assert ifeval.grade("a b", None, metadata) == 1.0
    assert ifeval.grade("A b", None, metadata) == 0.0
    assert ifeval.grade("", None, metadata) == 0.0


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "instruction_id_list"),
        ({"instruction_id_list": "punctuation:no_comma"}, "list of names"),
        ({"instruction_id_list": ["language:response_language"]}, "unknown instruction"),
        ({"instruction_id_list": ["keywords:existence"]}, "keywords"),
        (
            {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}]},
            "1 entries for 2 instructions",
        ),
        (
            {"instruction_id_list": ["punctuation:no_comma"], "kwargs": "[{}]"},
            "must be a list of objects",
        ),
        (
            {
                "instruction_id_list": ["keywords:frequency"],
                "kwargs": [{"keyword": "a", "frequency": 1, "relation": "about"}],
            },
            "neither 'at least' nor",
        ),
    ],
)
def test_an_instruction_that_cannot_be_checked_has_no_reward(metadata, words):
    with pytest.raises(GradingFailed, match=words):
        ifeval.grade("x", None, metadata)


def test_ifeval_grades_in_a_worker_process_which_gives_the_reason_of_a_failure():
    def sample(response, names, **more):
        metadata = {"instruction_id_list": names, "rm_type": "ifeval", **more}
        return Sample(index=0, response=response, status=Status.COMPLETED, metadata=metadata)

    fine = sample("a b[EOS]", ["change_case:english_lowercase"])
    few = sample("a", ["punctuation:no_comma"] * 2, kwargs=[{}])
    asyncio.run(grading.grade_group(ArgsView(make_config("none")), [fine, few]))
    assert ifeval.GRADER.quick is None
    assert fine.reward == 1.0
    assert few.status is Status.FAILED
    assert few.failure.startswith('grading failed: metadata["kwargs"] has 1 entries for 2')
