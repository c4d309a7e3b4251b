"""Batch arithmetic: tokens and requests that one GPU or engine holds at a time."""

from __future__ import annotations

from vime.config import Config


def tokens_per_micro_batch(cfg: Config) -> int:
    """Tokens of a training micro-batch on one GPU. A longer sample has its own micro-batch."""
    if cfg.batch.dynamic and cfg.batch.max_tokens_per_gpu is not None:
        return cfg.batch.max_tokens_per_gpu
    return -(-cfg.batch.micro_batch_size * longest_sample(cfg) // cfg.parallel.cp)


def forward_tokens(cfg: Config) -> int:
    """Tokens of a micro-batch on one GPU in a pass that only computes log-probabilities."""
    given = cfg.batch.log_probs_max_tokens_per_gpu
    return given if cfg.batch.dynamic and given else tokens_per_micro_batch(cfg)


def responses_per_engine(cfg: Config) -> int:
    """The maximum number of requests that one engine holds at a time."""
    prompts = max(cfg.batch.prompts, cfg.rollout.over_sampling or 0)
    shared = -(-prompts * cfg.batch.samples_per_prompt // max(1, cfg.cluster.num_engines))
    return min(cfg.rollout.concurrency, shared)


def longest_sample(cfg: Config) -> int:
    """Tokens of a prompt and its response, as far as the flags bound them."""
    return cfg.rollout.max_context_len or (
        (cfg.rollout.max_prompt_len or 0) + cfg.rollout.max_response_len
    )
