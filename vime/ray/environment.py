"""The environment and the folder of the driver, for the actors of a run.

On the driver's machine, a Ray that the run started passes both on. The nodes of a cluster that the
run joined have their own. So each actor gets the driver's when it starts. They do not travel in
Ray's runtime_env, because Ray writes that into its logs, and some of the variables are keys.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# Variables of the libraries that a run uses. Others belong to a node, such as PATH.
_PREFIXES = (
    "VIME_", "VLLM_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_",
    "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "FLASHINFER_", "NVTE_",
    "CUDA_DEVICE_", "CUDA_LAUNCH_", "CUBLAS_", "CUDNN_", "NCCL_", "GLOO_", "UCX_",
    "OMP_", "MKL_", "OPENBLAS_", "KMP_", "WANDB_", "TENSORBOARD", "XDG_CACHE_HOME", "FI_",
)  # fmt: skip
_SUFFIXES = ("_API_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_proxy", "_PROXY")
_OF_ONE_NODE = ("VLLM_HOST_IP", "RAY_AUTH_TOKEN")


def variables_for_workers(env: Mapping[str, str]) -> dict[str, str]:
    """The part of the driver's environment that every process of the run needs.

    The engines' key is that of the driver. If the driver has none, a node's own must not count:
    clients of its engine would not know it.
    """
    passed = {
        name: value
        for name, value in env.items()
        if (name.startswith(_PREFIXES) or name.endswith(_SUFFIXES)) and name not in _OF_ONE_NODE
    }
    return {"VLLM_API_KEY": "", **passed}


def remote(cls: type, env: Mapping[str, str], **options: Any) -> Any:
    """The Ray actor class of `cls`, with Ray's options.

    env  variables of this role, such as --train-env-vars; the driver's come first

    The constructor of the actor takes them and the driver's current folder before `cls` does
    anything. A node without this folder keeps its own.
    """
    import ray

    folder, wanted = os.getcwd(), {**variables_for_workers(os.environ), **env}

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        os.environ.update(wanted)
        if os.path.isdir(folder):
            os.chdir(folder)
        cls.__init__(self, *args, **kwargs)

    started_here = type(cls.__name__, (cls,), {"__init__": __init__, "__doc__": cls.__doc__})
    return ray.remote(started_here).options(**options)
