"""The context length of an engine: enough for this run's sequences, within the model's limit."""

from __future__ import annotations

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.config.hf_config import hf_config


def text_config(cfg: Config) -> dict:
    """The language model's part of config.json."""
    found = hf_config(cfg)
    return found.get("text_config", found)


def model_positions(cfg: Config) -> int | None:
    """The number of positions that config.json gives the model; None if it gives no number."""
    return text_config(cfg).get("max_position_embeddings")


def needed_model_len(cfg: Config) -> int | None:
    """The --max-model-len that rollouts and evaluations need; None: vLLM uses the model's limit.

    Prompts have a known bound only with --rollout-max-prompt-len or --rollout-max-context-len.
    """
    if "max_model_len" in cfg.engine.vllm_args:
        return None
    evaluated = eval_datasets(cfg) if cfg.eval.interval is not None else ()
    samplings = [cfg.rollout, *(dataset.cfg.rollout for dataset in evaluated)]
    lengths = [_length(r.max_context_len, r.max_prompt_len, r.max_response_len) for r in samplings]
    if None in lengths:
        return None
    cap = model_positions(cfg)
    needed = max(lengths)
    return min(needed, cap) if cap else needed


def _length(context: int | None, prompt: int | None, response: int) -> int | None:
    if context is not None:
        return context
    return None if prompt is None else prompt + response
