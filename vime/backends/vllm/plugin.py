"""vLLM calls `register` in each of its processes (entry point group vllm.general_plugins).

Other users of vLLM notice nothing: `register` adds weight transports by name. It does the rest only
in servers that `VLLMEngine` started; the environment variable `ENGINE_PATCHES` marks them.
"""

from __future__ import annotations

import os

from vime.backends.vllm.guard import die_with_parent
from vime.backends.vllm.plugin_patches import PATCHES
from vime.patches import apply_once

ENGINE_PATCHES = "VIME_ENGINE_PATCHES"  # comma-separated names; set for vime's own servers only

RECEIVERS = {  # the engine's side of each transport, in plugin_receivers.py
    "shm": "SharedMemoryReceiver",
    "gloo": "BroadcastReceiver",
    "nccl": "BroadcastReceiver",
    "ipc": "CudaIpcReceiver",
}


def vllm_name(transport: str) -> str:
    """The name under which vLLM knows a transport of vime."""
    return f"vime_{transport}"


def register() -> None:
    """Add the weight transports. In vime's servers, also patch vLLM and die with the parent."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as factory

    for transport, receiver in RECEIVERS.items():
        if vllm_name(transport) not in factory._registry:
            module = "vime.backends.vllm.plugin_receivers"
            factory.register_engine(vllm_name(transport), module, receiver)
    if names := os.environ.get(ENGINE_PATCHES):
        die_with_parent()
        os.register_at_fork(after_in_child=die_with_parent)
        wanted = names.split(",")
        apply_once(patch for patch in PATCHES if patch.name in wanted)
