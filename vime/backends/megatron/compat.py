"""Everything vime changes in torch or megatron-core, by name, with why and until when.

`apply()` runs first thing in a trainer process and nowhere else. `CPU_PATCHES` stand in for CUDA
calls that megatron-core makes on any machine; where CUDA exists they are not applied.
`PATCHES` mend megatron-core 0.16 to 0.19 on every machine.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_applied: set[str] = set()


@dataclass(frozen=True, slots=True)
class Patch:
    """symbols: dotted names that must exist for the patch to mean anything; a test checks them."""

    name: str
    why: str
    until: str
    symbols: tuple[str, ...]
    apply: Callable[[], None]


def apply() -> None:
    """Applies what this machine needs, once per process."""
    patches = PATCHES if torch.cuda.is_available() else (*CPU_PATCHES, *PATCHES)
    for patch in patches:
        if patch.name not in _applied:
            patch.apply()
            _applied.add(patch.name)


def resolve(symbol: str) -> Any:
    """The object behind "package.module.Class.attribute". Raises AttributeError or ImportError."""
    parts = symbol.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = __import__(".".join(parts[:cut]), fromlist=["_"])
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ImportError(symbol)


# --- CPU: stand-ins for CUDA ----------------------------------------------------------------------


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
    dispatcher.cuda_dtoh_stream = object()  # not None: the constructor then makes no stream
    dispatcher._maybe_dtoh_and_synchronize = host_copy


_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"

CPU_PATCHES = (
    Patch(
        "run eagerly",
        "compiling takes minutes on a CPU and small models gain nothing",
        "never; it is a choice",
        ("megatron.core.jit.disable_jit_fuser", "torch.compiler.set_stance"),
        _run_eagerly,
    ),
    Patch(
        "cuda entry points",
        "device, stream and RNG calls outside any device check",
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
        'device="cuda" and pinned memory in factories',
        "megatron-core asks torch.accelerator",
        tuple(f"torch.{n}" for n in _FACTORIES),
        _cuda_literals,
    ),
    Patch(
        "tensor methods",
        "Tensor.cuda() on counters, and buckets keyed by the type name torch.cuda.FloatTensor",
        "megatron-core asks torch.accelerator",
        ("torch.Tensor.cuda", "torch.Tensor.type"),
        _tensor_methods,
    ),
    Patch(
        "rng tracker",
        "tensor-parallel RNG states are kept in CUDA generators",
        "megatron-core asks torch.accelerator",
        (
            "megatron.core.tensor_parallel.random._get_cuda_rng_state",
            "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        ),
        _rng_tracker,
    ),
    Patch(
        "moe dispatcher",
        "split sizes go to the host on a side stream",
        "the dispatcher runs without streams",
        (f"{_DISPATCHER}._maybe_dtoh_and_synchronize", f"{_DISPATCHER}.cuda_dtoh_stream"),
        _moe_dispatcher,
    ),
)


# --- every machine: megatron-core without TransformerEngine and apex -----------------------------


def _router_gemm() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _latent_attention() -> None:
    import megatron.core.transformer.multi_latent_attention as mla

    if not isinstance(mla.TELinear, type):
        mla.HAVE_TE = False


def _adam_step() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stock = DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def keep_step(self: Any, model_param: torch.nn.Parameter, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None)
        stock(self, model_param, tensors)
        if step is not None:
            state["step"] = step.clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = keep_step


def _bucket_padding() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stock = DistributedOptimizer.sharded_param_state_fully_reshardable

    def with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero

        def padded(**options: Any) -> dict | None:
            state = gather(**options)
            for buffer_id, buffer in enumerate(self.buffers if state else ()):
                for tensors in state[buffer_id].values():
                    _spread(tensors, buffer)
            return state

        self.get_parameter_state_dp_zero = padded
        try:
            return stock(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    DistributedOptimizer.sharded_param_state_fully_reshardable = with_padding


def _spread(tensors: dict[str, Any], buffer: Any) -> None:
    """Moves each bucket from where it stands without padding to its offset in the buffer."""
    for key, packed in tensors.items():
        if torch.is_tensor(packed):
            tensors[key] = packed.new_zeros(buffer.numel)
            first = 0
            for bucket in buffer.buckets:
                length = bucket.numel_unpadded
                end = bucket.offset + length
                tensors[key][bucket.offset : end] = packed[first : first + length]
                first += length


def _float32_beside_bfloat16() -> None:
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    stock = Float16OptimizerWithFloat16Params.sharded_state_dict
    stock_load = Float16OptimizerWithFloat16Params.load_state_dict
    main = "fp32_from_fp16_params"

    @functools.wraps(stock)
    def with_float32(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = self.float16_groups
        self.float16_groups = [
            a + b for a, b in zip(plain, self.fp32_from_fp32_groups, strict=True)
        ]
        try:
            state = stock(self, *args, **kwargs)
        finally:
            self.float16_groups = plain
        state[main] = [group for group in state[main] if group]  # empty lists are not saved
        return state

    @functools.wraps(stock_load)
    def load(self: Any, state_dict: dict[str, Any]) -> Any:
        saved = iter(state_dict[main])
        groups = [next(saved) if group else [] for group in self.fp32_from_float16_groups]
        return stock_load(self, {**state_dict, main: groups})

    Float16OptimizerWithFloat16Params.sharded_state_dict = with_float32
    Float16OptimizerWithFloat16Params.load_state_dict = load


def _learning_rates_name_no_group() -> None:
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (optimizer, distrib_optimizer):
        known = module.param_group_identifier_keys
        of_a_flag = ("max_lr", "min_lr", "start_wd", "end_wd")
        module.param_group_identifier_keys = tuple(key for key in known if key not in of_a_flag)


def _many_tensors() -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    from vime.backends.megatron import many_tensors

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = many_tensors.l2_norm
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
            module.multi_tensor_scale_impl = many_tensors.scale


def _weight_gradients() -> None:
    from megatron.core.tensor_parallel import layers

    from vime.backends.megatron import weight_gradient

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = weight_gradient
        layers._grad_accum_fusion_available = True


_HALF = "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params"
_DISTOPT = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"

PATCHES = (
    Patch(
        "router gemm",
        "moe_utils reads te_general_gemm, which it never defines without TransformerEngine (0.16)",
        "megatron-core 0.16 is no longer supported",
        ("megatron.core.transformer.moe.moe_utils",),
        _router_gemm,
    ),
    Patch(
        "latent attention",
        "without TransformerEngine multi_latent_attention imports stand-ins for its classes, "
        "believes it present and calls isinstance with them (0.16)",
        "HAVE_TE says whether TransformerEngine is there",
        (
            "megatron.core.transformer.multi_latent_attention.HAVE_TE",
            "megatron.core.transformer.multi_latent_attention.TELinear",
        ),
        _latent_attention,
    ),
    Patch(
        "adam step",
        "without apex a loaded DistributedOptimizer shares one step tensor among all parameters, "
        "so AdamW counts it up once per parameter and the next update is silently wrong",
        "DistributedOptimizer.load_state_dict clones the step",
        (
            f"{_DISTOPT}._set_main_param_and_optimizer_states",
            f"{_DISTOPT}.__init__",
        ),
        _adam_step,
    ),
    Patch(
        "bucket padding",
        "the DistributedOptimizer's resharding checkpoint looks parameters up by their place in a "
        "padded buffer, in tensors gathered without the padding between buckets: past the first "
        "padded bucket (tied embeddings on a last pipeline stage always have one) it saves wrong "
        "values (0.16 to 0.19)",
        "sharded_param_state_fully_reshardable and get_parameter_state_dp_zero agree",
        (
            f"{_DISTOPT}.sharded_param_state_fully_reshardable",
            f"{_DISTOPT}.get_parameter_state_dp_zero",
        ),
        _bucket_padding,
    ),
    Patch(
        "float32 beside bfloat16",
        "a checkpoint of the plain bfloat16 optimizer counts its parameters without those that are "
        "float32 themselves, such as a critic's head, and cannot be loaded where a group has no "
        "others (0.16 to 0.19)",
        "sharded_state_dict and load_state_dict know fp32_from_fp32_groups",
        (f"{_HALF}.sharded_state_dict", f"{_HALF}.load_state_dict"),
        _float32_beside_bfloat16,
    ),
    Patch(
        "learning rates name no group",
        "a checkpoint's parameter groups are found by their learning rate too, so that a run "
        "cannot be continued with another --lr (0.19)",
        "groups are matched by what does not come from a flag",
        (
            "megatron.core.optimizer.optimizer.param_group_identifier_keys",
            "megatron.core.optimizer.distrib_optimizer.param_group_identifier_keys",
        ),
        _learning_rates_name_no_group,
    ),
    Patch(
        "many tensors",
        "without apex the gradient norm waits for the device once per parameter, and clipping and "
        "the copy of main parameters take two kernels and a temporary each",
        "Megatron's fallbacks use torch._foreach_*",
        (
            "megatron.core.optimizer.clip_grads.l2_norm_impl",
            "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl",
            "megatron.core.optimizer.optimizer.multi_tensor_scale_impl",
            "megatron.core.utils.local_multi_tensor_l2_norm",
            "megatron.core.utils.local_multi_tensor_scale",
            "torch._foreach_norm",
            "torch._foreach_copy_",
        ),
        _many_tensors,
    ),
    Patch(
        "weight gradients",
        "--gradient-accumulation-fusion calls an extension module of apex",
        "Megatron accumulates by torch.addmm(out_dtype=...)",
        (
            "megatron.core.tensor_parallel.layers._grad_accum_fusion_available",
            "megatron.core.tensor_parallel.layers.LinearWithGradAccumulationAndAsyncCommunication",
        ),
        _weight_gradients,
    ),
)


def allocate_optimizer_state(optimizer: Any) -> None:
    """Gives torch's optimizers their state before the first step: a sharded state dict needs it.

    `optimizer` is what `get_megatron_optimizer` returned. State that exists is left as it is; a
    step counter that a checkpoint of step 0 left out is put back.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if getattr(part, "init_state_fn", None) is None:
            part.init_state_fn = lambda *_: None  # SGD has none, and loading calls it
        is_adam = isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
        moments = ("exp_avg", "exp_avg_sq") if is_adam else ("momentum_buffer",)
        if not is_adam and not isinstance(inner, torch.optim.SGD):
            continue
        for group in inner.param_groups:
            for p in group["params"]:
                state = inner.state[p]
                for name in moments:
                    if state.get(name) is None:
                        state[name] = torch.zeros_like(p)
                if is_adam and "step" not in state:
                    state["step"] = torch.tensor(0.0)
