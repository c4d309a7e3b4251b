"""A rollout that was generated ahead of training, saved with the checkpoint before it.

The asynchronous loop generates rollout i+1 with the weights from before rollout i. A run that
resumes after i has newer weights. If it generated i+1 again, it would train on other samples than
an uninterrupted run, and it would repeat finished work.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vime.config import Config
from vime.config.fields import flag_of
from vime.errors import CheckpointError
from vime.files import written_whole
from vime.plugins.batch import LOG
from vime.rollout.plain import plain
from vime.types import RolloutFnTrainOutput, Sample

logger = logging.getLogger(__name__)

PACE = ("max_weight_staleness", "late_groups", "recompute_kv_cache", "concurrency")


@dataclass(frozen=True, slots=True)
class Ahead:
    """A finished rollout, with the state of the data source right after it."""

    rollout_id: int
    output: RolloutFnTrainOutput
    data_state: Any


def ahead_path(root: str, rollout_id: int) -> Path:
    """The file that belongs to the checkpoint after `rollout_id`."""
    return Path(root) / "rollout" / f"ahead_of_{rollout_id}.pt"


def save_ahead(cfg: Config, rollout_id: int, latest: Ahead | None) -> None:
    """Writes `latest` for the checkpoint after `rollout_id`, if it is ahead of it.

    Raises PluginError when a sample holds a value that no file can give back.
    """
    path = ahead_path(str(cfg.checkpoint.save), rollout_id)
    if latest is None or latest.rollout_id <= rollout_id:
        path.unlink(missing_ok=True)  # an earlier attempt may have left it
        return
    content = {
        "rollout_id": latest.rollout_id,
        "asked_for": flags_of_a_rollout(cfg),
        "groups": [[sample.to_dict() for sample in group] for group in latest.output.samples],
        "metrics": {name: float(value) for name, value in (latest.output.metrics or {}).items()},
        "data_state": latest.data_state,
    }
    content = plain(content, "--save: rollout ahead")
    with written_whole(path) as partial:
        torch.save(content, partial)


def load_ahead(cfg: Config, rollout_id: int) -> Ahead | None:
    """The rollout saved with the checkpoint after `rollout_id`.

    None if there is none, or if a flag that determines a rollout has changed. Raises
    CheckpointError for a file that cannot be read.
    """
    root = cfg.checkpoint.load or cfg.checkpoint.save
    path = ahead_path(str(root), rollout_id)
    if not path.is_file():
        return None
    try:
        content = torch.load(path, weights_only=True)
        groups = [[Sample.from_dict(sample) for sample in group] for group in content["groups"]]
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. Delete it; the run then generates the rollout again."
        ) from error
    if changed := changed_since(content["asked_for"], cfg):
        logger.warning(
            "%s was made with other sampling flags (%s), so the rollout is generated again",
            path,
            ", ".join(changed),
        )
        return None
    output = RolloutFnTrainOutput(groups, content["metrics"])
    return Ahead(content["rollout_id"], output, content["data_state"])


def changed_since(then: dict[str, str], cfg: Config) -> list[str]:
    """The flags whose values differ from the `flags_of_a_rollout` of an earlier run."""
    now = flags_of_a_rollout(cfg)
    return sorted(name for name in then.keys() | now if then.get(name) != now.get(name))


def flags_of_a_rollout(cfg: Config) -> dict[str, str]:
    """{flag: its value as text}: the flags that determine a rollout.

    They are every field of the data, rollout and reward sections, except the functions that only
    write a log, and the flags that only set the pace.
    """
    asked = {
        "--rollout-batch-size": repr(cfg.batch.prompts),
        "--n-samples-per-prompt": repr(cfg.batch.samples_per_prompt),
    }
    for section in (cfg.data, cfg.rollout, cfg.reward):
        for f in fields(section):
            spec = flag_of(f)
            if f.name not in PACE and (spec is None or spec.hook is not LOG):
                asked[spec.name if spec else f.name] = repr(getattr(section, f.name))
    return asked
