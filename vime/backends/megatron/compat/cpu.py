"""Replacements, on a CPU, for CUDA calls that megatron-core makes on any machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from vime.patches import Patch


def _run_eagerly() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch.compiler.set_stance("force_eager")
    import megatron.core.jit as jit

    jit.disable_jit_fuser()


def _cuda_entry_points() -> None:
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *a, **k: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)


_FACTORIES = ("zeros", "ones", "empty", "tensor", "empty_like", "zeros_like")


def _cuda_literals() -> None:
    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return call

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _tensor_methods() -> None:
    tensor: Any = torch.Tensor
    plain_type = tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.", 1)

    tensor.cuda = lambda self, *a, **k: self
    tensor.type = cuda_type


def _rng_tracker() -> None:
    import megatron.core.tensor_parallel.random as tp_random

    tp_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    tp_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)


def _moe_dispatcher() -> None:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def host_copy(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if not self.drop_and_pad and point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                value = getattr(self, name)
                if torch.is_tensor(value):
                    setattr(self, name, value.numpy())
        return tokens_per_expert

    dispatcher: Any = MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = object()  # the constructor makes a stream if this is None
    dispatcher._maybe_dtoh_and_synchronize = host_copy


_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"

CPU_PATCHES = (
    Patch(
        "run eagerly",
        "compiling takes minutes on a CPU, and small models gain nothing from it",
        "never: it is a choice, not a fault of the library",
        ("megatron.core.jit.disable_jit_fuser", "torch.compiler.set_stance"),
        _run_eagerly,
    ),
    Patch(
        "cuda entry points",
        "megatron-core calls torch.cuda for devices, streams and RNG without checking for a GPU",
        "megatron-core asks torch.accelerator",
        tuple(
            f"torch.cuda.{n}"
            for n in (
                "current_device",
                "synchronize",
                "manual_seed",
                "get_rng_state",
                "set_rng_state",
            )
        ),
        _cuda_entry_points,
    ),
    Patch(
        "cuda literals",
        'megatron-core allocates with device="cuda" and pinned memory',
        "megatron-core asks torch.accelerator",
        tuple(f"torch.{n}" for n in _FACTORIES),
        _cuda_literals,
    ),
    Patch(
        "tensor methods",
        "megatron-core calls Tensor.cuda() on counters and names its gradient buckets by "
        "torch.cuda.FloatTensor",
        "megatron-core asks torch.accelerator",
        ("torch.Tensor.cuda", "torch.Tensor.type"),
        _tensor_methods,
    ),
    Patch(
        "rng tracker",
        "megatron-core keeps tensor-parallel RNG states in CUDA generators",
        "megatron-core asks torch.accelerator",
        (
            "megatron.core.tensor_parallel.random._get_cuda_rng_state",
            "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        ),
        _rng_tracker,
    ),
    Patch(
        "moe dispatcher",
        "the mixture of experts copies split sizes to the host on a side stream",
        "the dispatcher runs without streams",
        (f"{_DISPATCHER}._maybe_dtoh_and_synchronize", f"{_DISPATCHER}.cuda_dtoh_stream"),
        _moe_dispatcher,
    ),
)
