"""`--rm-type ifeval`: 1 if a response follows every instruction of its prompt, else 0.

`metadata["instruction_id_list"]` names the instructions, and `metadata["kwargs"]` has a dict of
parameters for each, as in the public IFEval data (arXiv:2311.07911). The checks are vime's own
rules and use no model; `language:response_language` has none. A sample with an unknown instruction
fails, because its answer cannot be judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from vime.rollout.rm_hub.grader import Grader, GradingFailed

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_BULLET = re.compile(r"^\s*(?:[*+-]|•)\s+\S", re.MULTILINE)
_RULE = re.compile(r"^\s*\*\*\*\s*$", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\[[^\[\]]+\]")
_HIGHLIGHT = re.compile(r"\*\*[^*\n]+\*\*|\*[^*\n]+\*")
_TITLE = re.compile(r"<<[^<>\n]+>>")
_FENCE = re.compile(r"^```(?:json)?\s*|\s*```$", re.IGNORECASE)
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

Check = Callable[..., bool]


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> float:
    text = response.rsplit("</think>", 1)[-1].strip()
    names = metadata.get("instruction_id_list")
    if not names:
        raise GradingFailed('--rm-type ifeval needs metadata["instruction_id_list"]')
    parameters = metadata.get("kwargs") or [{}] * len(names)
    return float(bool(text) and all(map(_follows, names, parameters, [text] * len(names))))


GRADER = Grader(
    grade, grade, gives='1 if the response follows all of `metadata["instruction_id_list"]`'
)


def _follows(name: str, parameters: dict[str, Any] | None, text: str) -> bool:
    if name not in CHECKS:
        raise GradingFailed(f"unknown instruction {name!r}; known: {', '.join(CHECKS)}")
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    try:
        return CHECKS[name](text, **given)
    except (TypeError, ValueError, re.error) as error:
        raise GradingFailed(f"instruction {name} with {given}: {error}") from None


def _compare(count: int, number: int, relation: str) -> bool:
    if relation == "at least":
        return count >= int(number)
    if relation == "less than":
        return count < int(number)
    raise ValueError(f"the relation {relation!r} is neither 'at least' nor 'less than'")


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _has(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def _keyword_count(text: str, keyword: str, frequency: int, relation: str = "at least") -> bool:
    found = re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE)
    return _compare(len(found), frequency, relation)


def _letter_count(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_frequency, let_relation)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(len(_SENTENCE_END.split(text.strip())), num_sentences, relation)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in _RULE.split(text)]
    return len(parts) == int(num_paragraphs) and all(parts)


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != int(num_paragraphs) or not 1 <= int(nth_paragraph) <= len(parts):
        return False
    words = _words(parts[int(nth_paragraph) - 1])
    return bool(words) and words[0].lower() == first_word.lower()


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = re.escape(postscript_marker.strip())
    return re.search(rf"^\s*{marker}", text, re.IGNORECASE | re.MULTILINE) is not None


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    mark = re.escape(section_spliter.strip())
    found = re.findall(rf"^\s*[#*]*\s*{mark}\s+\w+", text, re.IGNORECASE | re.MULTILINE)
    return len(found) >= int(num_sections)


def _is_json(text: str) -> bool:
    try:
        json.loads(_FENCE.sub("", text.strip()))
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    capital = [word for word in _words(text) if word.isupper() and len(word) > 1]
    return _compare(len(capital), capital_frequency, capital_relation)


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, keywords: all(_has(text, word) for word in keywords),
    "keywords:frequency": _keyword_count,
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(_has(text, word) for word in forbidden_words)
    ),
    "keywords:letter_frequency": _letter_count,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, num_words, relation: _compare(
        len(_words(text)), num_words, relation
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(_PLACEHOLDER.findall(text)) >= int(num_placeholders)
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(_BULLET.findall(text)) == int(num_bullets)
    ),
    "detectable_format:constrained_response": lambda text: any(o in text for o in _OPTIONS),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        len(_HIGHLIGHT.findall(text)) >= int(num_highlights)
    ),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text: _TITLE.search(text) is not None,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: text.lower().startswith(
        prompt_to_repeat.strip().lower()
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: len(text) > 1 and text[0] == text[-1] == '"',
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "punctuation:no_comma": lambda text: "," not in text,
}
