"""`--rm-type f1`: the overlap of the words of response and label, counted as in SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from vime.rollout.rm_hub.grader import Grader

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> float:
    given, wanted = _words(response), _words(label or "")
    common = (Counter(given) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


GRADER = Grader(grade, grade, gives="word overlap with the label", needs_label=True)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
