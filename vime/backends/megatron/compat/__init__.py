"""Everything vime changes in torch or megatron-core, by name, with why and until when.

`apply()` runs first thing in a trainer process and nowhere else. `CPU_PATCHES` stand in for CUDA
calls that megatron-core makes on any machine; where CUDA exists they are not applied.
`PATCHES` mend megatron-core 0.16 to 0.19 on every machine.
"""

from __future__ import annotations

import torch

from vime.backends.megatron.compat.cpu import CPU_PATCHES
from vime.backends.megatron.compat.extensions import EXTENSION_PATCHES
from vime.backends.megatron.compat.optimizer import (
    OPTIMIZER_PATCHES,
    allocate_optimizer_state,
    every_rank_counts,
    forget_counters,
)
from vime.patches import apply_once

__all__ = [
    "CPU_PATCHES",
    "PATCHES",
    "allocate_optimizer_state",
    "apply",
    "every_rank_counts",
    "forget_counters",
]

PATCHES = (*EXTENSION_PATCHES, *OPTIMIZER_PATCHES)


def apply() -> None:
    """Applies what this machine needs, once per process."""
    apply_once(PATCHES if torch.cuda.is_available() else (*CPU_PATCHES, *PATCHES))
