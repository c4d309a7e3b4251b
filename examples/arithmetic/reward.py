"""The example's reward, and the advantage of each token up to the first mistake.

At the start hardly any answer is right. All samples of a problem are wrong, so comparing answers
teaches nothing. But each sample has right tokens before its first mistake. GRPO with process
supervision (arXiv:2402.03300, section 4.1.3) rewards steps. Here each token is a step: a right
token earns 1, the first mistake earns 0, and later tokens are ignored. Samples of a problem that
are equal up to a token form a group at that token.
"""

from __future__ import annotations

import os
import re
from itertools import chain, groupby, islice
from typing import Any

import torch

from vime.config.sections.algorithm import AlgorithmConfig
from vime.data import chat
from vime.data.rewards import score_samples
from vime.types import Sample, Status, TrainSequence

ANSWER = re.compile(r"(?:^|\n)Answer: (-?\d+)\s*(?:<\|im_end\|>)?$")


async def grade(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1 if the response ends by itself with the line `Answer: LABEL`, whatever the lines before
    it say; otherwise 0."""
    last = ANSWER.search(sample.response)
    ended = sample.status is Status.COMPLETED
    return float(ended and last is not None and last[1] == sample.label)


def compare_tokens(args: Any, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """--custom-reward-post-process-path: each sample's reward, and its mean advantage.

    Groups are complete here, but spread over ranks in the trainer. Therefore the advantages are
    computed here and travel in `train_metadata` to `token_advantages`. Ignored tokens have no loss.
    """
    cfg = args.config
    tokenizer = chat.load_tokenizer(cfg.model.hf_checkpoint)
    means = []
    for _, members in groupby(samples, key=lambda sample: sample.group_index):
        group = list(members)
        [work] = chat.encode(tokenizer, [group[0].metadata["work"] + tokenizer.eos_token])
        steps = [steps_of(sample, work) for sample in group]
        responses = [tuple(sample.tokens[sample.prompt_length :]) for sample in group]
        compared = compare(responses, steps, cfg.algorithm)
        for sample, advantages in zip(group, compared, strict=True):
            unread = sample.response_length - len(advantages)
            sample.loss_mask = [1] * len(advantages) + [0] * unread
            sample.train_metadata = {"advantages": advantages + [0.0] * unread}
            means.append(sum(advantages) / max(len(advantages), 1))
    return [float(sample.reward) for sample in samples], means


def steps_of(sample: Sample, work: list[int]) -> list[int]:
    """A 1 for each right token and a 0 for the first mistake. A right answer has no mistake."""
    response = sample.tokens[sample.prompt_length :]
    num_right = len(os.path.commonprefix([response, work]))
    if sample.reward == 1.0 or num_right == len(response):
        return [1] * len(response)
    return [1] * num_right + [0]


def compare(
    responses: list[tuple[int, ...]], steps: list[list[int]], cfg: AlgorithmConfig
) -> list[list[float]]:
    """The advantage of every step, by --advantage-estimator, among the steps that `responses` took
    after the same beginning."""
    places = [r[:t] for r, read in zip(responses, steps, strict=True) for t in range(len(read))]
    scores = iter(score_samples(list(chain.from_iterable(steps)), places, cfg))
    return [list(islice(scores, len(read))) for read in steps]


def token_advantages(
    args: Any, sequences: list[TrainSequence], old_logp: Any, ref_logp: Any
) -> list[torch.Tensor]:
    """--custom-advantage-function-path: [R] for each sequence."""
    return [torch.tensor(s.train_metadata["advantages"]) for s in sequences]
