"""The example's reward: a teacher who stops reading at the first mistake."""

from __future__ import annotations

import os
import re
from typing import Any

from vime.types import Sample, Status

ANSWER = re.compile(r"(?:^|\n)Answer: (-?\d+)\s*(?:<\|im_end\|>)?$")
FOR_WORK = 0.5


async def grade(args: Any, sample: Sample, **kwargs: Any) -> dict[str, float]:
    """{"right": 1 or 0, "credit": 0 to 1}; training takes the credit, evaluation what is right.

    right    1 when the response ends by itself and its last line is `Answer: LABEL`, however it got
             there
    credit   1 when it is right; otherwise half of the share of `metadata["work"]` that was written
             before the first difference, in characters

    The untrained model hardly gets an answer right: the samples of a problem would be wrong alike,
    and teach nothing. How far each of them came tells them apart.
    """
    last = ANSWER.search(sample.response)
    ended = sample.status is Status.COMPLETED
    right = float(ended and last is not None and last[1] == sample.label)
    work = sample.metadata["work"]
    matched = len(os.path.commonprefix([work, sample.response])) / len(work)
    return {"right": right, "credit": max(right, FOR_WORK * matched)}
