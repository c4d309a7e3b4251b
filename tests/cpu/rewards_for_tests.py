"""Graders that the end-to-end tests name by path."""

import os


async def share_of_sevens(args, sample, **kwargs) -> float:
    """The share of sevens in the response: a reward that a random model can raise at once.

    It also writes down the prompt, so that a test can compare the order of prompts in two runs.
    """
    if log := os.environ.get("PROMPT_LOG"):
        with open(log, "a") as f:
            f.write(f"{sample.rollout_id}\t{sample.index}\t{sample.label}\n")
    return sample.response.count("7") / max(1, sample.response_length)


async def brevity(args, sample, **kwargs) -> float:
    """The shorter, the better: a reward that differs between any two answers of a real model."""
    return 1.0 / (1 + len(sample.response))
