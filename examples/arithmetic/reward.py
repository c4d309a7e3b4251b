"""The example's reward: is the final answer right? Nothing is given for the work above it."""

from __future__ import annotations

import re
from typing import Any

from vime.types import Sample, Status

ANSWER = re.compile(r"(?:^|\n)Answer: ?(-?\d+)\s*(?:<\|im_end\|>)?$")


async def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1 when the response ends by itself and its last line is `Answer: LABEL`, else 0."""
    last = ANSWER.search(sample.response)
    ended = sample.status is Status.COMPLETED
    return float(ended and last is not None and last[1] == sample.label)
