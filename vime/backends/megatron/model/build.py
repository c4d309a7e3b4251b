"""Builds this rank's part of the model: Megatron's GPTModel, one chunk per virtual stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)
from torch import Tensor, nn

from vime import platform
from vime.backends.megatron.hf.registry import model_args
from vime.backends.megatron.kernels import chosen
from vime.backends.megatron.model import recompute
from vime.backends.megatron.model.freeze import freeze_parameters
from vime.backends.megatron.model.layer_spec import decoder_spec
from vime.backends.megatron.model.value_head import ValueHead
from vime.config import Config

# Modules whose weight is cut over tensor parallel ranks, and the axis of the cut.
_SHARDED: dict[type[nn.Module], int] = {
    tensor_parallel.VocabParallelEmbedding: 0,
    tensor_parallel.ColumnParallelLinear: 0,
    tensor_parallel.RowParallelLinear: 1,
}

# Megatron flags whose TransformerConfig field has another name.
_RENAMED = {"num_experts": "num_moe_experts", "norm_epsilon": "layernorm_epsilon"}


def build_model(
    cfg: Config, *, critic: bool = False, provider: Callable[[GPTModel], GPTModel] | None = None
) -> list[GPTModel]:
    """This rank's chunks, in --dtype, on this rank's device. Weights are uninitialised: load them.

    critic    gives values in place of logits, from a float32 head that starts at zero
    provider  changes a chunk, or gives another with the same weights' names
    Needs `initialize_parallel`. Raises ConfigError on an unknown family, or where a pattern of
    --freeze-params-name-list matches nothing. A collective.
    """
    args = model_args(cfg)
    config = transformer_config(cfg, args)
    num_chunks = cfg.parallel.vpp or 1
    chunks = []
    for stage in range(num_chunks):
        vp_stage = stage if num_chunks > 1 else None
        where = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
        chunk = GPTModel(
            config,
            decoder_spec(config, args, vp_stage),
            padded_vocab_size(args, cfg.parallel.tp),
            args["max_position_embeddings"],
            pre_process=mpu.is_pipeline_first_stage(**where),
            post_process=mpu.is_pipeline_last_stage(**where),
            parallel_output=True,
            share_embeddings_and_output_weights=not (
                critic or args["untie_embeddings_and_output_weights"]
            ),
            position_embedding_type="rope",
            rotary_percent=args["rotary_percent"],
            rotary_base=args["rotary_base"],
            vp_stage=vp_stage,
        )
        if args.get("use_rope_scaling"):
            _scale_rope(chunk, args)
        if critic and chunk.post_process:
            chunk.output_layer = ValueHead(config)
        if provider is not None:
            chunk = provider(chunk)
        _mark_shards(chunk)
        _mark_experts(chunk)
        if not critic:
            _hide_padded_vocab(chunk, args["vocab_size"])
        here = platform.current()
        chunks.append(chunk.cuda() if here.is_cuda else chunk)
    freeze_parameters(chunks, args, cfg)
    return chunks


def transformer_config(cfg: Config, args: dict[str, Any]) -> TransformerConfig:
    """MODEL_ARGS and the layout as Megatron's own config; field names are Megatron's flag names."""
    p, here = cfg.parallel, platform.current()
    again = p.recompute_modules
    dtype = here.dtype(cfg.model.dtype)
    kind = MLATransformerConfig if args.get("multi_latent_attention") else TransformerConfig
    known = {f.name for f in fields(kind)}
    named = {_RENAMED.get(k, k): v for k, v in args.items()}
    values = {k: v for k, v in named.items() if k in known}
    if not args.get("group_query_attention"):
        values["num_query_groups"] = args["num_attention_heads"]
    values.setdefault("moe_router_load_balancing_type", "none")
    values.setdefault("moe_router_dtype", "fp32")
    values.setdefault("moe_router_bias_update_rate", 0.0)
    if args.get("swiglu"):
        values |= {"activation_func": F.silu, "gated_linear_unit": True}
    values["add_bias_linear"] = not args.get("disable_bias_linear", False)
    values |= {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype.itemsize == 2,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": p.tp,
        "pipeline_model_parallel_size": p.pp,
        "virtual_pipeline_model_parallel_size": p.vpp,
        "context_parallel_size": p.cp,
        "expert_model_parallel_size": p.ep,
        "expert_tensor_parallel_size": p.etp,
        "sequence_parallel": p.sequence_parallel and p.tp > 1,
        "recompute_granularity": p.recompute_granularity,
        "recompute_method": p.recompute_method,
        "recompute_num_layers": p.recompute_num_layers,
        "recompute_modules": [m for m in again if m not in recompute.OURS] if again else None,
        "use_cpu_initialization": not here.is_cuda,
        "perform_initialization": False,  # every weight is loaded
        "variable_seq_lengths": True,  # packs differ in length
        "moe_token_dispatcher_type": "alltoall",  # asked for by the line above, dense or not
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
        "gradient_accumulation_fusion": here.is_cuda and not chosen().plain,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        # torch.compile'd in Megatron; vime has kernels of its own, and without dropout the other
        # is one addition
        "bias_activation_fusion": chosen().plain and here.is_cuda,
        "bias_dropout_fusion": chosen().plain and here.is_cuda,
        "attention_softmax_in_fp32": True,
    }
    if p.vpp:
        values |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    config = kind(**values)
    recompute.note(config, again)
    return config


def padded_vocab_size(args: dict[str, Any], tp: int) -> int:
    """Rows of the embedding: the vocabulary, filled up to a multiple of what --tp shares evenly.

    Megatron's default multiple is 128; here it is 1 unless --make-vocab-size-divisible-by is given,
    since padding costs logits.
    """
    multiple = args.get("make_vocab_size_divisible_by", 1) * tp
    return -(-args["vocab_size"] // multiple) * multiple


def _scale_rope(chunk: GPTModel, args: dict[str, Any]) -> None:
    """Llama 3.1's frequencies (arXiv:2407.21783), with every constant of config.json.

    Megatron's own scaling knows the factor only. Defaults are those that it has built in.
    """
    low = args.get("rope_scaling_low_freq_factor", 1.0)
    high = args.get("rope_scaling_high_freq_factor", 4.0)
    turns = args.get("rope_scaling_original_max_position", 8192) / (2 * math.pi)
    rope = chunk.rotary_pos_emb
    # 0 for wavelengths that the original context holds less than `low` times, 1 from `high` on
    kept = ((turns * rope.inv_freq - low) / (high - low)).clamp(0, 1)
    factor = args.get("rope_scaling_factor", 8.0)
    rope.inv_freq = rope.inv_freq * (kept + (1 - kept) / factor)


def _mark_shards(chunk: GPTModel) -> None:
    """Says which weights are shards. Megatron does so while it initialises them, which is skipped
    here; without the marks the gradient norm counts the shards of tensor rank 0 only."""
    for module in chunk.modules():
        weight = getattr(module, "weight", None)
        dim = next((d for kind, d in _SHARDED.items() if isinstance(module, kind)), None)
        if dim is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)


def _mark_experts(chunk: GPTModel) -> None:
    """Says that experts see other tokens than the dense layers of their tensor rank do.

    Megatron marks them under expert parallelism only. But where merely the tensor parallel sizes
    differ, the gradient of an expert would lack the tokens of the other tensor ranks; and with one
    marking for all layouts the optimizer's state has one shape, so that it reshards.
    """
    for name, parameter in chunk.named_parameters():
        if ".local_experts." in name:
            parameter.allreduce = False


def _hide_padded_vocab(chunk: GPTModel, vocab_size: int) -> None:
    """Gives padded vocabulary entries probability 0: they must not change a log-probability."""
    if not chunk.post_process or chunk.vocab_size == vocab_size:
        return
    per_rank = chunk.vocab_size // mpu.get_tensor_model_parallel_world_size()
    real = max(0, min(per_rank, vocab_size - per_rank * mpu.get_tensor_model_parallel_rank()))
    if real == per_rank:
        return

    def fill(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        mask = logits.new_zeros(per_rank)
        mask[real:] = -1e30  # finite: 0 * log(0) must stay 0 in an entropy
        return logits + mask, bias

    chunk.output_layer.register_forward_hook(fill)
