"""Every change that vime makes to torch or megatron-core: a `Patch`, why, and until when.

A trainer process calls `apply()` before it imports Megatron; no other process does. `CPU_PATCHES`
replace CUDA calls that megatron-core makes on any machine, and apply only without CUDA. `PATCHES`
correct megatron-core 0.16 to 0.19 on every machine.
"""

from __future__ import annotations

import torch

from vime.backends.megatron.compat.cpu import CPU_PATCHES
from vime.backends.megatron.compat.extensions import EXTENSION_PATCHES
from vime.backends.megatron.compat.optimizer import OPTIMIZER_PATCHES
from vime.backends.megatron.compat.router import ROUTER_PATCHES
from vime.patches import apply_once

PATCHES = (*EXTENSION_PATCHES, *OPTIMIZER_PATCHES, *ROUTER_PATCHES)


def apply() -> None:
    """Applies the patches for this machine, once per process."""
    apply_once(PATCHES if torch.cuda.is_available() else (*CPU_PATCHES, *PATCHES))
