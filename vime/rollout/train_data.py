"""Turns a rollout's groups into the batch and the metrics, and calls the user's hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from vime.data.batching import build_train_batch
from vime.data.columns import as_train_batch
from vime.data.sample_metrics import of_samples
from vime.plugins.hook import Plugin
from vime.types import Group, RolloutFnEvalOutput, TrainBatch


def make_train_batch(args: Any, groups: list[Group], rollout_id: int) -> TrainBatch:
    """Makes a batch of the groups. Three hooks can change it.

    --custom-convert-samples-to-train-data-path replaces the whole conversion, and
    --custom-reward-post-process-path the normalisation of rewards. --rollout-data-postprocess-path
    may change the finished batch. Raises PluginError when a hook breaks its contract.
    """
    cfg = args.config
    weigh = _with_args(cfg.algorithm.plugin("custom_reducer_path"), args)
    if convert := cfg.rollout.plugin("convert_path"):
        samples = [sample for group in groups for sample in group]
        made = convert(args, samples)
        batch = as_train_batch(made, cfg, rollout_id, weigh=weigh)
        own = of_samples(samples, cfg.algorithm.needs_reward)
        batch = replace(batch, metrics={**own, **batch.metrics})
    else:
        post_process = _with_args(cfg.reward.plugin("post_process_path"), args)
        batch = build_train_batch(groups, cfg, rollout_id, post_process=post_process, weigh=weigh)
    if change := cfg.rollout.plugin("data_postprocess_path"):
        changed = change(args, rollout_id, batch)
        batch = batch if changed is None else as_train_batch(changed, cfg, rollout_id)
    return batch


def _with_args(plugin: Plugin | None, args: Any) -> Callable[..., Any] | None:
    return partial(plugin, args) if plugin else None


def rollout_metrics(
    args: Any, groups: list[Group], rollout_id: int, metrics: dict[str, float], rollout_s: float
) -> dict[str, float]:
    """The metrics of a rollout to log.

    --custom-rollout-log-function-path may change `metrics` in place. If it returns True, nothing is
    logged.
    """
    log = args.config.rollout.plugin("log_path")
    if log is None:
        return metrics
    samples = [sample for group in groups for sample in group]
    return {} if log(rollout_id, args, samples, metrics, rollout_s) else metrics


def eval_metrics(args: Any, output: RolloutFnEvalOutput, rollout_id: int) -> dict[str, float]:
    """The metrics of an evaluation to log, with --custom-eval-rollout-log-function-path."""
    log = args.config.eval.plugin("log_path")
    metrics = dict(output.metrics)
    if log is None:
        return metrics
    return {} if log(rollout_id, args, output.data, metrics) else metrics
