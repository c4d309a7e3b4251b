"""The example's reward, and which token earned it: a teacher stops reading at the first mistake.

The model starts with hardly an answer right: the samples of a problem are wrong alike, and
comparing them teaches nothing. But each has right tokens before its first mistake. GRPO with
process supervision (arXiv:2402.03300, section 4.1.3) rewards the steps of a group's samples and
compares them with each other. Here a token is a step: 1 if right, 0 if the first mistake; the rest
is not read. The mean over the group's tokens is taken off. Dividing by their spread as well would
make the last mistakes of a problem the loudest (see arXiv:2503.20783).
"""

from __future__ import annotations

import os
import re
from itertools import groupby
from typing import Any

import torch

from vime.data import chat
from vime.types import Sample, Status, TrainSequence

ANSWER = re.compile(r"(?:^|\n)Answer: (-?\d+)\s*(?:<\|im_end\|>)?$")


async def grade(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1 when the response ends by itself and its last line is `Answer: LABEL`, however it got
    there; else 0."""
    last = ANSWER.search(sample.response)
    ended = sample.status is Status.COMPLETED
    return float(ended and last is not None and last[1] == sample.label)


def compare_tokens(args: Any, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """--custom-reward-post-process-path: each sample's reward, and its mean advantage.

    Groups are whole here, and no longer on the trainer's ranks: `token_advantages` finds there what
    this leaves in `train_metadata`. What is not read has no loss.
    """
    tokenizer = chat.load_tokenizer(args.config.model.hf_checkpoint)
    works = chat.encode(tokenizer, [s.metadata["work"] + tokenizer.eos_token for s in samples])
    steps = [steps_of(sample, work) for sample, work in zip(samples, works, strict=True)]
    means = []
    for _, members in groupby(range(len(samples)), key=lambda i: samples[i].group_index):
        members = list(members)
        group = [step for i in members for step in steps[i]]
        share_right = sum(group) / max(len(group), 1)
        for i in members:
            sample, unread = samples[i], samples[i].response_length - len(steps[i])
            advantages = [step - share_right for step in steps[i]]
            sample.loss_mask = [1] * len(advantages) + [0] * unread
            sample.train_metadata = {"advantages": advantages + [0.0] * unread}
            means.append(sum(advantages) / max(len(advantages), 1))
    return [float(sample.reward) for sample in samples], means


def steps_of(sample: Sample, work: list[int]) -> list[int]:
    """A 1 for each right token, and a 0 for the first mistake; a right answer has none."""
    response = sample.tokens[sample.prompt_length :]
    num_right = len(os.path.commonprefix([response, work]))
    if sample.reward == 1.0 or num_right == len(response):
        return [1] * len(response)
    return [1] * num_right + [0]


def token_advantages(
    args: Any, sequences: list[TrainSequence], old_logp: Any, ref_logp: Any
) -> list[torch.Tensor]:
    """--custom-advantage-function-path: [R] for each sequence."""
    return [torch.tensor(s.train_metadata["advantages"]) for s in sequences]
