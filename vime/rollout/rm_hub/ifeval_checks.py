"""IFEval's instructions (arXiv:2311.07911): whether a text follows one, with its parameters.

Each check gives the verdict of the public benchmark, in time linear in the text. Two kinds differ,
because they need models: sentences end at marks of punctuation here, and the two checks of English
case do not look for another language.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
_ABBREVIATION = re.compile(r"(?:^|\W)(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|e\.g|i\.e)\.$")
_WORD = re.compile(r"\w+")
_TOKEN_END = re.compile(r"[\s,;:!?()\[\]{}\"<>]+|(?=['’])")
_HIGHLIGHTS = (re.compile(r"\*([^*\n]*)\*"), re.compile(r"\*\*([^*\n]*)\*\*"))
_FIRST_WORD = re.compile(r"[^.,?!'\"]*")
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_POSTSCRIPTS = {"P.S.": re.compile(r"p\.\s?s\."), "P.P.S": re.compile(r"p\.\s?p\.\s?s")}

Check = Callable[..., bool]


def _compare(count: int, number: int, relation: str) -> bool:
    if relation == "at least":
        return count >= int(number)
    if relation == "less than":
        return count < int(number)
    raise ValueError(f"the relation {relation!r} is neither 'at least' nor 'less than'")


def _count(text: str, phrase: str) -> int:
    """How often the phrase occurs in any case, inside words too."""
    return text.lower().count(phrase.lower())


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    text = text.strip()
    ends = [
        text[max(0, found.start() - 12) : found.start()] for found in _SENTENCE_END.finditer(text)
    ]
    return _compare(1 + sum(not _ABBREVIATION.search(end) for end in ends), num_sentences, relation)


def _parts(text: str, mark: str) -> list[str] | None:
    """The parts between marks; None if one is empty that is neither first nor last."""
    parts = [part.strip() for part in text.split(mark)]
    return [part for part in parts if part] if all(parts[1:-1]) else None


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _parts(text, "***")
    return parts is not None and len(parts) == int(num_paragraphs)


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts, at = text.split("\n\n"), int(nth_paragraph)
    count = sum(bool(part.strip()) for part in parts)
    if count != int(num_paragraphs) or not 1 <= at <= count or not parts[at - 1].strip():
        return False
    word = parts[at - 1].split(maxsplit=1)[0].lstrip("'").lstrip('"')
    return _FIRST_WORD.match(word)[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    count = 0
    for line in text.split("\n"):
        at = line.find("[")
        while at >= 0 and (end := line.find("]", at)) >= 0:
            count, at = count + 1, line.find("[", end)
    return count >= int(num_placeholders)


def _postscript(text: str, postscript_marker: str) -> bool:
    marker, lower = postscript_marker.strip(), text.lower()
    if marker in _POSTSCRIPTS:
        return _POSTSCRIPTS[marker].search(lower) is not None
    return marker.lower() in lower


def _bullets(text: str, num_bullets: int) -> bool:
    lines = [line.lstrip() for line in text.split("\n")]
    starred = sum(line.startswith("*") and not line.startswith("**") for line in lines)
    starred -= lines[-1] == "*"
    return starred + sum(line.startswith("-") for line in lines) == int(num_bullets)


def _highlights(text: str, num_highlights: int) -> bool:
    found = [mark for pattern in _HIGHLIGHTS for mark in pattern.findall(text)]
    return sum(bool(mark.strip()) for mark in found) >= int(num_highlights)


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    mark = re.escape(section_spliter.strip())
    return len(re.findall(rf"{mark}\s?\d", text)) >= int(num_sections)


def _is_json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].strip("<>").strip():
            return True
    return False


def _two_responses(text: str) -> bool:
    parts = _parts(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    capital = sum(word.isupper() for word in _TOKEN_END.split(text))
    return _compare(capital, capital_frequency, capital_relation)


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, keywords: all(_count(text, word) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation="at least": _compare(
        _count(text, keyword), frequency, relation
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(_has_word(text, word) for word in forbidden_words)
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _compare(
        _count(text, letter), let_frequency, let_relation
    ),
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, num_words, relation: _compare(
        len(_WORD.findall(text)), num_words, relation
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text: any(o in text for o in _OPTIONS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
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
