"""Evaluation: every dataset of --eval-prompt-data, n samples a prompt, all in flight at once.

Whatever no --eval-* flag sets is inherited from the --rollout-* flags.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from functools import lru_cache
from typing import Any

from vime.config import Config, EvalConfig, RolloutConfig
from vime.config.view import ArgsView
from vime.data import chat
from vime.data.datasets import DataKeys, PromptDataset
from vime.errors import ConfigError, EngineError
from vime.rollout import metrics
from vime.rollout.data_source import render_prompts, to_sample
from vime.rollout.vllm_rollout import Rollout, _current, finish_group, make_client
from vime.types import Group, RolloutFnEvalOutput, Status

logger = logging.getLogger(__name__)

INHERITED = (
    "temperature",
    "top_p",
    "top_k",
    "max_response_len",
    "max_prompt_len",
    "max_context_len",
)


RUNTIME = ("vllm_engine_urls", "vllm_router_ip", "vllm_router_port", "weight_version")


async def evaluate(args: Any, rollout_id: int) -> RolloutFnEvalOutput:
    """Raises EngineError when a dataset has no graded sample at all."""
    cfg: Config = args.config
    reward_key = cfg.eval.reward_key or cfg.reward.reward_key
    eval_cfg = replace(
        cfg,
        rollout=resolve(cfg.eval, cfg.rollout),
        reward=replace(cfg.reward, reward_key=reward_key),
    )
    eval_args = ArgsView(eval_cfg, **{k: getattr(args, k) for k in RUNTIME if hasattr(args, k)})
    async with make_client(eval_args) as client:
        tokenizer = chat.load_tokenizer(cfg.model.hf_checkpoint)
        rollout = Rollout(eval_args, rollout_id, client, tokenizer, evaluation=True)
        _current.set(rollout)
        names = list(cfg.eval.datasets)
        results = await asyncio.gather(*(_evaluate_dataset(rollout, name) for name in names))
    output = RolloutFnEvalOutput({})
    for name, (data, values) in zip(names, results, strict=True):
        output.data[name] = data
        output.metrics |= values
    return output


def resolve(evaluation: EvalConfig, rollout: RolloutConfig) -> RolloutConfig:
    """The sampling parameters of an evaluation: --eval-* where set, else --rollout-*."""
    given = {name: getattr(evaluation, name) for name in INHERITED}
    return replace(rollout, **{name: value for name, value in given.items() if value is not None})


async def _evaluate_dataset(rollout: Rollout, name: str) -> tuple[dict[str, list], dict]:
    groups = make_groups(rollout.cfg, rollout.cfg.eval.datasets[name])
    groups = await asyncio.gather(*(finish_group(rollout, group) for group in groups))
    graded = [[s for s in group if s.reward is not None] for group in groups]
    rewards = [[s.get_reward_value(rollout.args) for s in group] for group in graded]
    samples = [s for group in graded for s in group]
    if not samples:
        raise EngineError(f"no sample of evaluation {name} got a reward: {groups[0][0].failure}")
    data = {
        "rewards": [reward for group in rewards for reward in group],
        "truncated": [s.status is Status.TRUNCATED for s in samples],
        "samples": samples,
    }
    return data, metrics.of_evaluation(name, groups, rewards)


def make_groups(cfg: Config, path: str) -> list[Group]:
    """Fresh samples of every prompt; the same indices, hence seeds, in every evaluation."""
    data = cfg.data
    keys = DataKeys(
        input=cfg.eval.input_key or data.input_key,
        label=cfg.eval.label_key or data.label_key,
        metadata=data.metadata_key,
        tools=data.tool_key,
    )
    count = cfg.eval.samples_per_prompt
    groups = []
    rendered, num_long = _rendered(_Once((cfg.model.hf_checkpoint, path, keys), cfg))
    if not rendered:
        raise ConfigError(
            f"--eval-max-prompt-len (or --rollout-max-prompt-len) {cfg.rollout.max_prompt_len} "
            f"drops every prompt of {path}. Raise it."
        )
    if num_long:
        logger.warning("%d prompts of %s are longer than the limit, left out", num_long, path)
    for i, (row, prompt, ids) in enumerate(rendered):
        groups.append(
            [to_sample(row, prompt, ids, group_index=i, index=i * count + j) for j in range(count)]
        )
    return groups


class _Once:
    """Carries the configuration into a cache that only looks at what identifies the dataset."""

    def __init__(self, key: tuple, cfg: Config) -> None:
        self.key, self.cfg = key, cfg

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once) and self.key == other.key


@lru_cache(maxsize=8)
def _rendered(once: _Once) -> tuple[list[tuple], int]:
    """([(row, prompt, token ids)], prompts left out), read and tokenised once a process."""
    cfg, (_, path, keys) = once.cfg, once.key
    rows = list(PromptDataset(path, keys))
    prompts, ids = render_prompts(cfg, rows)
    cap = cfg.rollout.max_prompt_len
    kept = [
        item for item in zip(rows, prompts, ids, strict=True) if cap is None or len(item[2]) <= cap
    ]
    return kept, len(rows) - len(kept)
