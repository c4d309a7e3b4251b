"""From what a rollout gave to what the trainer gets and the log shows, through the user's hooks."""

from __future__ import annotations

from functools import partial
from typing import Any

from vime.data.batching import build_train_batch
from vime.data.columns import as_train_batch
from vime.errors import PluginError
from vime.rollout.plugins import (
    CONVERT,
    DATA_POSTPROCESS,
    EVAL_LOG,
    LOG,
    POST_PROCESS,
    load_function,
)
from vime.rollout.training_hooks import REDUCER
from vime.types import Group, RolloutFnEvalOutput, TrainBatch


def make_train_batch(args: Any, groups: list[Group], rollout_id: int) -> TrainBatch:
    """The groups as a batch; each of the three hooks on the way is optional.

    --custom-convert-samples-to-train-data-path takes the place of everything, then
    --custom-reward-post-process-path of the rewards' normalisation; --rollout-data-postprocess-path
    has the last word. Raises PluginError on a hook that breaks its contract.
    """
    cfg = args.config
    path = cfg.algorithm.custom_reducer_path
    weigh = partial(load_function(path, REDUCER), args) if path else None
    if path := cfg.rollout.convert_path:
        samples = [sample for group in groups for sample in group]
        made = load_function(path, CONVERT)(args, samples)
        batch = as_train_batch(made, cfg, rollout_id, weigh=weigh)
    else:
        path = cfg.reward.post_process_path
        post_process = partial(load_function(path, POST_PROCESS), args) if path else None
        batch = build_train_batch(groups, cfg, rollout_id, post_process=post_process, weigh=weigh)
    if path := cfg.rollout.data_postprocess_path:
        changed = load_function(path, DATA_POSTPROCESS)(args, rollout_id, batch)
        if changed is not None and not isinstance(changed, TrainBatch):
            raise PluginError(
                f"--rollout-data-postprocess-path {path} returned {type(changed).__name__}; return "
                "a TrainBatch (dataclasses.replace makes one), or None to keep the one it got."
            )
        batch = batch if changed is None else changed
    return batch


def rollout_metrics(
    args: Any, groups: list[Group], rollout_id: int, metrics: dict[str, float], rollout_s: float
) -> dict[str, float]:
    """What is logged of a rollout. --custom-rollout-log-function-path may change `metrics` in
    place, or return True to log nothing of it."""
    path = args.config.rollout.log_path
    if path is None:
        return metrics
    samples = [sample for group in groups for sample in group]
    skips = load_function(path, LOG)(rollout_id, args, samples, metrics, rollout_s)
    return {} if skips else metrics


def eval_metrics(args: Any, output: RolloutFnEvalOutput, rollout_id: int) -> dict[str, float]:
    """The same for an evaluation, by --custom-eval-rollout-log-function-path."""
    path = args.config.eval.log_path
    metrics = dict(output.metrics)
    if path is None:
        return metrics
    skips = load_function(path, EVAL_LOG)(rollout_id, args, output.data, metrics)
    return {} if skips else metrics
