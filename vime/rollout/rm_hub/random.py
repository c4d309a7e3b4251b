"""`--rm-type random`: 0 or 1, drawn from --rollout-seed and the sample's index."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from vime.rollout.rm_hub.grader import Grader

if TYPE_CHECKING:
    from vime.types import Sample


async def grade(args: Any, sample: Sample) -> float:
    return float(random.Random(f"{args.config.data.seed}/{sample.index}").randint(0, 1))


GRADER = Grader(grade, gives="0 or 1", takes_sample=True)
