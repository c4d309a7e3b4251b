"""Reads the lines of metrics.jsonl: reward, scores, seconds by phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REWARD = "rollout/raw_reward"
LOSS = "train/loss"
STEP_TIME = "perf/step_time"

# the name of a phase -> the metrics that it adds up
PHASES: dict[str, tuple[str, ...]] = {
    "rollout": ("perf/rollout_time",),
    "reward": ("perf/reward_time",),
    "log-probs": (
        "perf/log_probs_time",
        "perf/ref_log_probs_time",
        "perf/teacher_log_probs_time",
    ),
    "train": ("perf/actor_train_time",),
    "sync": ("perf/update_weights_time",),
    "sleep": ("perf/sleep_time", "perf/wake_up_time"),
    "save": ("perf/save_time",),
    "eval": ("perf/eval_time",),
}


def eval_scores(record: Mapping[str, Any]) -> dict[str, float]:
    """{data set: mean score} of the evaluation in a line; empty without one.

    `eval/NAME` is a score. `eval/NAME-truncated_ratio`, `eval/NAME-pass@4` and `eval/NAME/...` are
    its details, and `eval/step` is an axis.
    """
    names = [n for n in record if n.startswith("eval/") and n != "eval/step"]
    details = {n for n in names for m in names if n != m and n.startswith((f"{m}-", f"{m}/"))}
    return {
        n.removeprefix("eval/"): float(record[n])
        for n in names
        if n not in details and isinstance(record[n], (int, float))
    }


def phase_seconds(record: Mapping[str, Any]) -> dict[str, float]:
    """{phase: seconds} of the phases in a line."""
    seconds = {}
    for phase, names in PHASES.items():
        timed = [record[n] for n in names if isinstance(record.get(n), (int, float))]
        if timed:
            seconds[phase] = float(sum(timed))
    return seconds
