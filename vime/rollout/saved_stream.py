"""The outstanding groups of a stream, saved with the checkpoint.

A run that resumes trains on the same groups as a run that was not interrupted.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from vime.config import Config
from vime.errors import CheckpointError
from vime.files import written_whole
from vime.rollout.ahead import changed_since, flags_of_a_rollout
from vime.rollout.plain import plain
from vime.rollout.stream import Entry
from vime.types import Group, Sample

logger = logging.getLogger(__name__)


def stream_path(root: str, rollout_id: int) -> Path:
    """The file that belongs to the checkpoint after `rollout_id`."""
    return Path(root) / "rollout" / f"stream_{rollout_id}.pt"


def save_stream(cfg: Config, rollout_id: int, entries: list[Entry]) -> None:
    """Writes the groups. Raises PluginError when a sample holds a value that no file can hold."""
    content = {
        "asked_for": flags_of_a_rollout(cfg),
        "entries": [
            {
                "group": _as_dicts(entry.group),
                "version": entry.version,
                "finished": entry.finished,
                "fresh": _as_dicts(entry.fresh),
            }
            for entry in entries
        ],
    }
    with written_whole(stream_path(str(cfg.checkpoint.save), rollout_id)) as partial:
        torch.save(plain(content, "--save: outstanding groups"), partial)


def load_stream(cfg: Config, rollout_id: int) -> list[Entry]:
    """The groups that were saved with the checkpoint after `rollout_id`.

    [] if none were. If a flag that determines a rollout has changed, the groups begin again. Raises
    CheckpointError for a file that cannot be read.
    """
    path = stream_path(str(cfg.checkpoint.load or cfg.checkpoint.save), rollout_id)
    if not path.is_file():
        return []
    try:
        content = torch.load(path, weights_only=True)
        entries = [
            Entry(
                _from_dicts(saved["group"]),
                saved["version"],
                saved["finished"],
                _from_dicts(saved["fresh"]),
            )
            for saved in content["entries"]
        ]
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. Delete it; the run then generates its groups again, with "
            "other prompts."
        ) from error
    if changed := changed_since(content["asked_for"], cfg):
        logger.warning(
            "%s was made with other sampling flags (%s), so its groups begin again",
            path,
            ", ".join(changed),
        )
        entries = [Entry(entry.fresh, entry.version) for entry in entries]
    return entries


def _as_dicts(group: Group) -> list[dict[str, Any]]:
    return [sample.to_dict() for sample in group]


def _from_dicts(group: list[dict[str, Any]]) -> Group:
    return [Sample.from_dict(sample) for sample in group]
