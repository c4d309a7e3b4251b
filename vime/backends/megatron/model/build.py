"""Builds this rank's part of the model: Megatron's GPTModel, one chunk per virtual stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from vime import platform
from vime.backends.megatron.hf.registry import model_args
from vime.backends.megatron.model.freeze import freeze_parameters
from vime.backends.megatron.model.layer_spec import decoder_spec
from vime.backends.megatron.model.marks import mark_experts, mark_shards
from vime.backends.megatron.model.megatron_config import transformer_config
from vime.backends.megatron.model.value_head import ValueHead
from vime.backends.megatron.model.vocabulary import hide_padding, padded_vocab_size
from vime.config import Config


def build_model(
    cfg: Config, *, critic: bool = False, provider: Callable[[GPTModel], GPTModel] | None = None
) -> list[GPTModel]:
    """This rank's chunks, in --dtype, on this rank's device. Weights are uninitialised: load them.

    critic    a float32 head, which starts at zero, gives values in place of logits
    provider  changes a chunk, or returns another whose weights have the same names
    Needs `initialize_parallel`. A collective. Raises ConfigError if the family is unknown, or if a
    pattern of --freeze-params-name-list matches nothing.
    """
    args = model_args(cfg)
    config = transformer_config(cfg, args)
    num_chunks = cfg.parallel.vpp or 1
    chunks = []
    for vp_stage in range(num_chunks) if num_chunks > 1 else [None]:
        chunk = _gpt_model(cfg, config, args, vp_stage, share_embeddings=not critic)
        if critic and chunk.post_process:
            chunk.output_layer = ValueHead(config)
        if provider is not None:
            chunk = provider(chunk)
        mark_shards(chunk)
        mark_experts(chunk)
        if not critic:
            hide_padding(chunk, args["vocab_size"])
        chunks.append(chunk.cuda() if platform.current().is_cuda else chunk)
    freeze_parameters(chunks, args, cfg)
    return chunks


def _gpt_model(
    cfg: Config,
    config: TransformerConfig,
    args: dict[str, Any],
    vp_stage: int | None,
    *,
    share_embeddings: bool,
) -> GPTModel:
    where = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
    tied = not args["untie_embeddings_and_output_weights"]
    chunk = GPTModel(
        config,
        decoder_spec(config, args, vp_stage),
        padded_vocab_size(args, cfg.parallel.tp),
        args["max_position_embeddings"],
        pre_process=mpu.is_pipeline_first_stage(**where),
        post_process=mpu.is_pipeline_last_stage(**where),
        parallel_output=True,
        share_embeddings_and_output_weights=share_embeddings and tied,
        position_embedding_type="rope",
        rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"],
        vp_stage=vp_stage,
    )
    if args.get("use_rope_scaling"):
        _scale_rope(chunk, args)
    return chunk


def _scale_rope(chunk: GPTModel, args: dict[str, Any]) -> None:
    """Llama 3.1's frequencies (arXiv:2407.21783), with every constant of config.json.

    Megatron's own scaling takes the factor only. The defaults here are the constants built into it.
    """
    low = args.get("rope_scaling_low_freq_factor", 1.0)
    high = args.get("rope_scaling_high_freq_factor", 4.0)
    turns = args.get("rope_scaling_original_max_position", 8192) / (2 * math.pi)
    rope = chunk.rotary_pos_emb
    # 0 for a wavelength that fits fewer than `low` times into the original context, 1 from `high`
    kept = ((turns * rope.inv_freq - low) / (high - low)).clamp(0, 1)
    factor = args.get("rope_scaling_factor", 8.0)
    rope.inv_freq = rope.inv_freq * (kept + (1 - kept) / factor)
