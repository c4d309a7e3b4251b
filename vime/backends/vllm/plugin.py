"""vLLM calls `register` in each of its processes (entry point group vllm.general_plugins).

Other users of vLLM notice nothing: `register` adds weight transports by name, and the rest happens
only in servers that `VLLMEngine` started, which the environment variable `ENGINE_PATCHES` marks.
"""

from __future__ import annotations

import os

from vime.backends.vllm.guard import die_with_parent
from vime.backends.vllm.plugin_patches import PATCHES
from vime.patches import apply_once

ENGINE_PATCHES = "VIME_ENGINE_PATCHES"  # comma-separated names; set for vime's own servers only

TRANSFER_ENGINES = {
    "vime_shm": "SharedMemoryEngine",
    "vime_gloo": "GlooEngine",
    "vime_nccl": "NcclEngine",
    "vime_ipc": "CudaIpcEngine",
}


def register() -> None:
    """Add the weight transports. In vime's servers, also patch vLLM and die with the parent."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as factory

    for name, cls in TRANSFER_ENGINES.items():
        if name not in factory._registry:
            factory.register_engine(name, "vime.backends.vllm.plugin_transfer", cls)
    if names := os.environ.get(ENGINE_PATCHES):
        die_with_parent()
        os.register_at_fork(after_in_child=die_with_parent)
        wanted = names.split(",")
        apply_once(patch for patch in PATCHES if patch.name in wanted)
