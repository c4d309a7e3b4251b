"""A multi-turn environment: the model may write `calc: 37*46` and reads the result in a tool turn.

    --custom-generate-function-path examples.calculator.environment.generate_with_calculator

Tokens are only appended. Sampled tokens stay as the engine sampled them; the tool's turn is
tokenised once and carries no loss. All state is in the sample, so --partial-rollout can continue a
sample that was aborted in the middle.
"""

from __future__ import annotations

import asyncio
import atexit
import re
import time
from typing import Any

from examples.calculator.tool import Calculator
from vime.rollout.generation import append_observation, generate
from vime.types import Sample, Status

MAX_CALLS = 2
TURN = "<|im_start|>assistant\n"
TOOL = "<|im_start|>tool\n"
OBSERVATION = "\n" + TOOL + "{}<|im_end|>\n" + TURN
CALL = re.compile(r"calc: ([^\n<]{1,64})(?:<\|im_end\|>)?\s*")

calculator = Calculator()
atexit.register(calculator.close)


async def generate_with_calculator(
    args: Any, sample: Sample, sampling_params: dict[str, Any]
) -> Sample:
    """Alternates between generating and calculating until the model calls nothing more."""
    while True:
        sample = await generate(args, sample, sampling_params)
        expression, calls = find_call(sample), sample.response.count(TOOL)
        sample.metadata["calls"] = calls
        if expression is None or calls >= MAX_CALLS:
            return sample
        started = time.perf_counter()
        result = await asyncio.to_thread(calculator.run, expression)
        sample.non_generation_time += time.perf_counter() - started
        append_observation(sample, OBSERVATION.format(result))


def find_call(sample: Sample) -> str | None:
    """The expression in the turn that the model has just ended; None if it calls nothing."""
    if sample.status is not Status.COMPLETED:
        return None
    found = CALL.fullmatch(sample.response.rsplit(TURN, 1)[-1])
    return found and found[1]


async def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1 if the last turn has the right answer in a box, otherwise 0."""
    last = sample.response.rsplit(TURN, 1)[-1]
    return float(f"\\boxed{{{sample.label}}}" in last)
