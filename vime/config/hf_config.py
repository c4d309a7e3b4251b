"""The one reader of a Hugging Face folder's `config.json`."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from vime.config import Config
from vime.errors import CheckpointError


@lru_cache
def read_config(hf_dir: str) -> dict[str, Any]:
    """A folder's `config.json`, read once per process. Raises CheckpointError with its path."""
    path = Path(hf_dir, "config.json")
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist. --hf-checkpoint is a folder in Hugging Face format "
            "(config.json, tokenizer files, *.safetensors)."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}. Download the folder again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download the folder again.")
    return found


def hf_config(cfg: Config) -> dict[str, Any]:
    """The `config.json` of --hf-checkpoint; {} if it cannot be read.

    The rule `checkpoint_is_there` reports that problem, so the other checks do not.
    """
    try:
        return read_config(cfg.model.hf_checkpoint)
    except (CheckpointError, OSError):
        return {}


def num_layers(cfg: Config) -> int:
    """Layers of the model; 0 if config.json cannot be read."""
    found = hf_config(cfg).get("num_hidden_layers", 0)
    return cfg.model.args.get("num_layers", found) if cfg.model.override else found
