"""Rollouts as files, for --save-debug-rollout-data and --load-debug-rollout-data.

A path contains `{rollout_id}`. A file holds {"rollout_id", "groups": [[Sample.to_dict(), ..]],
"metrics"}. Reading a file never runs code from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vime.errors import ConfigError
from vime.files import written_whole
from vime.rollout.plain import plain
from vime.types import Group, RolloutFnEvalOutput, RolloutFnTrainOutput, Sample


def save_rollout(path: str, rollout_id: int, groups: list[Group], metrics: dict) -> Path:
    """Writes one rollout. Raises PluginError when a sample holds a value that is not plain."""
    return _write(
        Path(path.format(rollout_id=rollout_id)),
        {
            "rollout_id": rollout_id,
            "groups": [[_plain(sample) for sample in group] for group in groups],
            "metrics": {name: float(value) for name, value in metrics.items()},
        },
    )


def save_evaluation(path: str, rollout_id: int, output: RolloutFnEvalOutput) -> Path:
    """Writes one evaluation, with `eval_{rollout_id}` in place of the rollout's id."""
    data = {
        name: {**part, "samples": [_plain(sample) for sample in part.get("samples", [])]}
        for name, part in output.data.items()
    }
    where = Path(path.format(rollout_id=f"eval_{rollout_id}"))
    return _write(where, {"rollout_id": rollout_id, "data": data})


def _plain(sample: Sample) -> dict[str, Any]:
    return plain(sample.to_dict(), f"--save-debug-rollout-data: sample {sample.index}")


def _write(path: Path, content: dict[str, Any]) -> Path:
    with written_whole(path) as partial:
        torch.save(content, partial)
    return path


def load_rollout(path: str, rollout_id: int) -> RolloutFnTrainOutput:
    """Reads the file of `save_rollout`. Raises ConfigError when it is missing or cannot be read."""
    file = Path(path.format(rollout_id=rollout_id))
    name = f"--load-debug-rollout-data {path}"
    if not file.is_file():
        raise ConfigError(
            f"{name}: {file} does not exist. Lower --num-rollout to the number of saved rollouts, "
            "or correct the path."
        )
    try:
        content = torch.load(file, weights_only=True)
        groups = [[Sample.from_dict(sample) for sample in group] for group in content["groups"]]
    except Exception as error:
        raise ConfigError(f"{name}: {file} is not a saved rollout: {error}") from error
    return RolloutFnTrainOutput(groups, dict(content["metrics"]))


def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """The rollout function of --load-debug-rollout-data."""
    if evaluation:
        raise ConfigError("--load-debug-rollout-data holds no evaluations. Remove --eval-interval.")
    return load_rollout(args.config.debug.load_rollout_data, rollout_id)
