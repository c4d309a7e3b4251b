"""Evaluation: n samples for each prompt of every data set, all requests at once.

`vime/config/evaluation.py` decides the settings of each data set.
"""

from __future__ import annotations

import asyncio
import logging
from functools import lru_cache
from typing import Any

from vime.config.evaluation import EvalDataset, eval_datasets
from vime.config.view import ArgsView
from vime.data import chat
from vime.data.datasets import DataKeys, PromptDataset
from vime.errors import ConfigError, EngineError
from vime.rollout import metrics
from vime.rollout.client import GenerateClient
from vime.rollout.generation import Rollout, finish_group, make_client
from vime.rollout.prompts import Rendered, render_rows, to_sample
from vime.types import Group, RolloutFnEvalOutput, Status

logger = logging.getLogger(__name__)

RUNTIME = (
    "vllm_engine_urls",
    "vllm_router_ip",
    "vllm_router_port",
    "vllm_api_key",
    "generation",
)


async def evaluate(args: Any, rollout_id: int) -> RolloutFnEvalOutput:
    """Scores every data set. Raises EngineError when no sample of a data set was graded."""
    datasets = eval_datasets(args.config)
    async with make_client(args, args.config.eval.concurrency, "evaluate") as client:
        results = await asyncio.gather(
            *(_evaluate_dataset(args, rollout_id, client, dataset) for dataset in datasets)
        )
    output = RolloutFnEvalOutput({})
    for dataset, (data, values) in zip(datasets, results, strict=True):
        output.data[dataset.name] = data
        output.metrics |= values
    if len(datasets) > 1:
        print(metrics.evaluation_table([dataset.name for dataset in datasets], output.metrics))
    return output


async def _evaluate_dataset(
    args: Any, rollout_id: int, client: GenerateClient, dataset: EvalDataset
) -> tuple[dict[str, list], dict]:
    cfg = dataset.cfg
    view = ArgsView(cfg, **{k: getattr(args, k) for k in RUNTIME if hasattr(args, k)})
    tokenizer = chat.load_tokenizer(cfg.model.hf_checkpoint)
    rollout = Rollout(view, rollout_id, client, tokenizer, True, cfg.eval.min_new_tokens)
    groups = make_groups(dataset)
    groups = await asyncio.gather(*(finish_group(rollout, group) for group in groups))
    graded = [[s for s in group if s.reward is not None] for group in groups]
    rewards = [[s.get_reward_value(view) for s in group] for group in graded]
    samples = [s for group in graded for s in group]
    if not samples:
        reason = groups[0][0].failure
        raise EngineError(f"no sample of evaluation {dataset.name} got a reward: {reason}")
    data = {
        "rewards": [reward for group in rewards for reward in group],
        "truncated": [s.status is Status.TRUNCATED for s in samples],
        "samples": samples,
    }
    return data, metrics.of_evaluation(dataset.name, groups, rewards)


def make_groups(dataset: EvalDataset) -> list[Group]:
    """New samples of every prompt. Their indices, and so their seeds, never change."""
    count = dataset.cfg.eval.samples_per_prompt
    rendered, num_long = _rendered(_Once(dataset))
    if not rendered and not num_long:
        raise ConfigError(
            f"the chat template refuses every prompt of {dataset.path}; the warnings above name "
            "rows and reasons. Correct the file, or use a template that takes its messages."
        )
    if not rendered:
        raise ConfigError(
            f"--eval-max-prompt-len (or --rollout-max-prompt-len) "
            f"{dataset.cfg.rollout.max_prompt_len} drops every prompt of {dataset.path}. Raise it."
        )
    if num_long:
        logger.warning("%d prompts of %s are left out: they are too long", num_long, dataset.path)
    groups = []
    for i, (row, prompt, ids) in enumerate(rendered):
        group = [
            to_sample(row, prompt, ids, group_index=i, index=i * count + j) for j in range(count)
        ]
        for sample in group:
            sample.metadata |= dataset.metadata_overrides or {}
        groups.append(group)
    return groups


class _Once:
    """A cache key for a data set. It compares only the settings that determine the prompts."""

    def __init__(self, dataset: EvalDataset) -> None:
        cfg = dataset.cfg
        self.cfg, self.path, self.cap = cfg, dataset.path, cfg.rollout.max_prompt_len

    def __hash__(self) -> int:
        return hash((self.cfg.model.hf_checkpoint, self.path, self.cap))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Once)
            and hash(self) == hash(other)
            and self.cfg.data == other.cfg.data
        )


@lru_cache(maxsize=32)
def _rendered(once: _Once) -> tuple[list[Rendered], int]:
    """(prompts that fit, number of prompts that are too long), read once per process."""
    data, cap = once.cfg.data, once.cap
    keys = DataKeys(
        input=data.input_key, label=data.label_key, metadata=data.metadata_key, tools=data.tool_key
    )
    rendered = render_rows(once.cfg, list(PromptDataset(once.path, keys)))
    kept = [part for part in rendered if cap is None or len(part[2]) <= cap]
    return kept, len(rendered) - len(kept)
