"""Megatron's flags that have no field in the configuration.

`MODEL_FLAGS` describe an architecture; they are compared with `config.json`. `STATED` are flags of
common launch scripts that ask for the only behaviour that vime has. This value is accepted, and all
other values are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _one_or_more(text: str) -> int | str:
    """`--moe-layer-freq`: a number, or a pattern such as "([0]*1+[1]*47)"."""
    return int(text) if text.isdigit() else text


SWITCH = bool

MODEL_FLAGS: dict[str, Callable[[str], object]] = {
    "--num-layers": int,
    "--hidden-size": int,
    "--ffn-hidden-size": int,
    "--num-attention-heads": int,
    "--group-query-attention": SWITCH,
    "--num-query-groups": int,
    "--kv-channels": int,
    "--max-position-embeddings": int,
    "--seq-length": int,
    "--position-embedding-type": str,
    "--use-rotary-position-embeddings": SWITCH,
    "--rotary-base": float,
    "--rotary-percent": float,
    "--rotary-interleaved": SWITCH,
    "--rotary-seq-len-interpolation-factor": float,
    "--use-rope-scaling": SWITCH,
    "--rope-scaling-factor": float,
    "--normalization": str,
    "--norm-epsilon": float,
    "--apply-layernorm-1p": SWITCH,
    "--qk-layernorm": SWITCH,
    "--post-self-attn-layernorm": SWITCH,
    "--post-mlp-layernorm": SWITCH,
    "--multi-latent-attention": SWITCH,
    "--q-lora-rank": int,
    "--kv-lora-rank": int,
    "--qk-head-dim": int,
    "--qk-pos-emb-head-dim": int,
    "--v-head-dim": int,
    "--rope-type": str,
    "--rotary-scaling-factor": float,
    "--original-max-position-embeddings": int,
    "--beta-fast": float,
    "--beta-slow": float,
    "--mscale": float,
    "--mscale-all-dim": float,
    "--swiglu": SWITCH,
    "--disable-bias-linear": SWITCH,
    "--add-qkv-bias": SWITCH,
    "--vocab-size": int,
    "--make-vocab-size-divisible-by": int,
    "--untie-embeddings-and-output-weights": SWITCH,
    "--num-experts": int,
    "--moe-ffn-hidden-size": int,
    "--moe-layer-freq": _one_or_more,
    "--moe-shared-expert-intermediate-size": int,
    "--moe-router-topk": int,
    "--moe-router-score-function": str,
    "--moe-router-pre-softmax": SWITCH,
    "--moe-router-num-groups": int,
    "--moe-router-group-topk": int,
    "--moe-router-enable-expert-bias": SWITCH,
    "--moe-router-bias-update-rate": float,
    "--moe-router-dtype": str,
    "--moe-router-load-balancing-type": str,
    "--moe-router-topk-scaling-factor": float,
    "--moe-aux-loss-coeff": float,
    "--moe-token-dispatcher-type": str,
    "--moe-token-drop-policy": str,
    "--moe-grouped-gemm": SWITCH,
    "--moe-permute-fusion": SWITCH,
}


@dataclass(frozen=True, slots=True)
class Stated:
    """A flag's accepted values (a switch has none), and the reason for refusing other values."""

    values: tuple[str, ...] = ()
    because: str = ""


STATED: dict[str, Stated] = {
    "--attention-dropout": Stated(("0", "0.0"), "neither training nor generation uses dropout"),
    "--hidden-dropout": Stated(("0", "0.0"), "neither training nor generation uses dropout"),
    "--attention-softmax-in-fp32": Stated(),
    "--attention-backend": Stated(("auto", "flash"), "vime has its own attention"),
    "--use-mcore-models": Stated(),
    "--train-backend": Stated(("megatron",), "Megatron-core is the trainer"),
    "--qkv-format": Stated(("thd",), "sequences are always packed"),
    "--megatron-to-hf-mode": Stated(("raw",), "weights are named by vime's own rules"),
    "--distributed-backend": Stated(("nccl",), "GPUs use NCCL, and CPU ranks use gloo"),
    "--update-weight-mode": Stated(("full",), "the trainer sends all weights"),
    "--update-weight-transport": Stated(("nccl",), "engines on other GPUs use NCCL"),
    "--vllm-weight-sync-packed": Stated(),
    "--rollout-data-transport": Stated(("object-store",), "batches travel through Ray"),
    "--flush-cache-interval": Stated(("1",), "every update of the weights empties the caches"),
    "--disable-rollout-trim-samples": Stated(),
    "--use-dynamic-global-batch-size": Stated(),
    "--ckpt-format": Stated(("torch_dist",), "checkpoints have the format torch_dist"),
    "--no-rope-fusion": Stated(),
    "--no-masked-softmax-fusion": Stated(),
    "--no-bias-dropout-fusion": Stated(),
    "--no-bias-swiglu-fusion": Stated(),
    "--no-gradient-accumulation-fusion": Stated(),
}

BF16 = "--bf16"  # another spelling of --dtype bfloat16
