"""A record in every checkpoint of the states that it holds beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from vime.config import Config

ENTRY = "vime"  # the record's key in the common state


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The saved states, and the settings that a run must share with the saving run to load them.

    layout  ranks on each axis: RNG states fit only the same layout
    frozen  `freezing` of the run: optimizer state fits only the same trained weights
    extra   the caller's values as JSON text
    """

    optimizer: bool
    scheduler: bool = False
    rng: bool = False
    critic: bool = False
    layout: dict[str, int] | None = None
    frozen: str | None = None
    extra: str = "{}"

    @classmethod
    def of(cls, common: dict[str, Any]) -> Contents:
        """Reads the record in a common state. Checkpoints of other programs have no record."""
        return cls(**common.get(ENTRY, {"optimizer": "optimizer" in common}))

    def entry(self) -> dict[str, Any]:
        """The record as an entry of the common state."""
        return {ENTRY: asdict(self)}


def current_layout() -> dict[str, int]:
    """Ranks on each axis of this run."""
    return {
        "world": dist.get_world_size(),
        "tp": mpu.get_tensor_model_parallel_world_size(),
        "pp": mpu.get_pipeline_model_parallel_world_size(),
        "cp": mpu.get_context_parallel_world_size(),
        "ep": mpu.get_expert_model_parallel_world_size(),
    }


def freezing(cfg: Config) -> str:
    """The flag that chooses which weights train, with its values; "" when all of them train."""
    o = cfg.optimizer
    given = {
        "--freeze-params-name-list": o.freeze_names,
        "--only-train-params-name-list": o.train_names,
    }
    return "".join(f"{flag} {' '.join(names)}" for flag, names in given.items() if names)
